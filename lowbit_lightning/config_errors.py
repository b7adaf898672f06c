"""Say what is wrong with a configuration in one message: the key, the value, the file and line, and the remedy.

jsonargparse knows what is wrong, but says it after a page of usage and inside a list of every type that did not match.
:class:`ConfigParser` hands its message on as :class:`ConfigProblem`, and :func:`explain` finds the one line in it that
matters, the place the value came from, and the closest thing that would have been right.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lowbit_lightning.config_sources import Entry, entries
from lowbit_lightning.errors import InvalidArgumentError, LowBitError, WrongLightningError

CONFIGURABLE = (LightningModule, LightningDataModule, Callback, Optimizer, LRScheduler, Strategy, Logger)

EARLIER_WORDING = (
    # jsonargparse 4.39, the oldest that Lightning takes, says the same in other words.
    (r"Validation failed: ", ""),
    (r"does not accept nested key", "does not accept option"),
    (r"Key '([^']+)' is not expected", r"Option '\1' is not accepted"),
    (r'Key "([^"]+)" is required but not included in config object.*', r"the following arguments are required: \1"),
    (r"Unrecognized arguments", "unrecognized arguments"),
)


class ConfigProblem(Exception):
    """A message of jsonargparse. Neither a TypeError nor a ValueError: jsonargparse catches those itself."""


class ConfigParser(LightningArgumentParser):
    """A parser that raises :class:`ConfigProblem` instead of printing its usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report what could not be parsed."""
        if not self.exit_on_error:  # a parser that jsonargparse made to try one type out
            super().error(message, ex)
        raise ConfigProblem(message) from ex


def explain(message: str, arguments: Sequence[str], parser: LightningArgumentParser) -> LowBitError:
    """The error to show for a message of jsonargparse.

    Args:
        message: What jsonargparse said.
        arguments: The command line, names of shipped configurations already replaced by paths.
        parser: The parser of the subcommand, for the names of the options there are.

    Raises:
        InvalidArgumentError: A configuration file that is not readable YAML, which is then the cause.
    """
    given = entries(arguments)
    for earlier, present in EARLIER_WORDING:
        message = re.sub(earlier, present, message)
    innermost = message[max(message.rfind('Parser key "'), 0) :]
    value = re.search(r"(?:Got|Given) value: (.)", innermost)
    if message.count('Parser key "') > 1 and value and value[1] not in "[{":
        # A plain value inside a class: its alternatives may name classes too, as `lr: float | Tensor` does.
        return _wrong_type(given, message, innermost)
    for pattern, handler in (
        (r"Import path (\S+) does not correspond to a subclass of (\w+)", _wrong_base),
        (r"Expected a dot import path string: (\S+)", _unknown_class),
        (r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted", _unknown_argument),
        (r"Problem with given class_path '([^']+)':\s+the following arguments are required: (.+)", _missing_argument),
    ):
        if found := re.search(pattern, message):
            return handler(given, *found.groups())
    if found := re.search(
        r"Import path does not correspond to a subclass of (\w+).*\n\s*Given value: (\S+)", message, re.S
    ):
        return _wrong_base(given, found[2], found[1])
    if found := re.search(r"Problem with given class_path '([^']+)':\s+(?=\S)(?!Parser key)(.+)", message):
        return _unknown_class(given, *found.groups())
    if found := re.search(r"(?:Group '(\w+)' does|does) not accept option '([^']+)'", message):
        return _unknown_key(given, parser, ".".join(part for part in found.groups() if part))
    if found := re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: -+([^\s=]+)", message):
        return _unknown_key(given, parser, found[1] or found[2])
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        return InvalidArgumentError(f"unexpected argument {found[1]!r}: options start with `--`.")
    if found := re.search(r"the following arguments are required: (?:\w+\.)?(\w+)", message):
        return InvalidArgumentError(
            f"`{found[1]}:` is missing. A complete run is for instance `--config quickstart`;"
            " `lowbit-lightning list` shows all of them, `lowbit-lightning cp NAME DEST` copies one to change."
        )
    if found := re.search(r'Parser key "([^"]+)"', message):
        return _wrong_type(given, message, innermost)
    return InvalidArgumentError(message.strip())


def _wrong_base(given: list[Entry], class_path: str, base: str) -> LowBitError:
    where = _where(given, class_path)
    bases = inspect.getmro(_import(class_path))
    if any(cls.__module__.partition(".")[0] == "pytorch_lightning" for cls in bases):
        stock = class_path.startswith("pytorch_lightning.")
        remedy = f"; here: lightning.pytorch{class_path.removeprefix('pytorch_lightning')}" if stock else ""
        return WrongLightningError(
            f"{where}{class_path} is built on `pytorch_lightning`, a separate copy of Lightning whose classes this"
            f" Trainer does not accept. Import lightning.pytorch instead of pytorch_lightning{remedy}."
        )
    return InvalidArgumentError(f"{where}{class_path} is not a {base}.")


def _unknown_class(given: list[Entry], class_path: str, reason: str = "") -> LowBitError:
    known = {name for base in CONFIGURABLE for cls in _subclasses(base) for name in (cls.__name__, _path(cls))}
    module_name, _, class_name = class_path.rpartition(".")
    try:
        public = vars(importlib.import_module(module_name)) if module_name else {}
        known |= {f"{module_name}.{name}" for name, value in public.items() if inspect.isclass(value)}
        reason = (
            f"module {module_name} has no class {class_name}" if module_name and class_name not in public else reason
        )
    except ImportError as error:
        reason = f"cannot import {module_name}: {error}"
    problem = reason.strip() or "no class of this name is known; a class of your own needs its full path, package.Class"
    return InvalidArgumentError(
        f"{_where(given, class_path)}{class_path}: {problem}.{_did_you_mean(class_path, known)}"
    )


def _unknown_argument(given: list[Entry], class_path: str, name: str) -> LowBitError:
    entry = _find(given, name)
    value = f" = {entry.text}" if entry and entry.text else ""
    where = f"{entry.origin}: {entry.path}{value}: " if entry else ""
    cls = _import(class_path)
    if cls in CONFIGURABLE:  # `--optimizer.lr 1` with no optimizer chosen before it
        return InvalidArgumentError(f"{where}choose a class first, with class_path: {class_path} is only its base.")
    accepted = _constructor_arguments(cls)
    guess = _did_you_mean(name, accepted) or f" It takes {', '.join(sorted(accepted))}."
    return InvalidArgumentError(f"{where}{class_path} does not take {name!r}.{guess}")


def _constructor_arguments(cls: type) -> set[str]:
    """What ``init_args`` may hold: the constructor's parameters, with those of its bases where it passes them on."""
    names: set[str] = set()
    for base in inspect.getmro(cls)[:-1]:
        parameters = inspect.signature(base).parameters.values()
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names |= {parameter.name for parameter in parameters if parameter.kind not in variable}
        if not any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names - {"params", "optimizer"}  # given by the CLI


def _missing_argument(given: list[Entry], class_path: str, names: str) -> LowBitError:
    return InvalidArgumentError(
        f"{_where(given, class_path)}{class_path} needs {names.strip()}; give it under init_args."
    )


def _unknown_key(given: list[Entry], parser: LightningArgumentParser, key: str) -> LowBitError:
    accepted = {action.dest for action in parser._actions if action.dest not in ("help", "print_config")}
    # `optimiser.class_path` is wrong in its first part: say that part, compare it with its siblings.
    prefixes = {".".join(dest.split(".")[:depth]) for dest in accepted for depth in range(1, 4)}
    parts = key.split(".")
    depth = next((n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) not in prefixes), len(parts))
    wrong = ".".join(parts[:depth])
    siblings = {prefix for prefix in prefixes if prefix.count(".") == wrong.count(".")}
    entry = next((entry for entry in reversed(given) if entry.path == wrong), None) or next(
        (entry for entry in reversed(given) if entry.path == key), None
    )
    value = f" = {entry.text}" if entry and entry.text else ""
    where = f"{entry.origin}: " if entry else ""
    guess = _did_you_mean(wrong, siblings) or " Add --help to see every key."
    return InvalidArgumentError(f"{where}unknown key {wrong}{value}.{guess}")


def _wrong_type(given: list[Entry], message: str, innermost: str) -> LowBitError:
    keys = re.findall(r'Parser key "([^"]+)"', message)
    found = re.search(r"(?:Got value|Given value): (.*)", innermost)
    value = found[1].strip() if found else ""
    candidates = [
        entry for entry in given if entry.key == keys[-1].rpartition(".")[2] and entry.path.startswith(keys[0])
    ]
    entry = next(
        (entry for entry in reversed(candidates) if entry.text == value), candidates[-1] if candidates else None
    )
    where = f"{entry.origin}: {entry.path}" if entry else ".".join(keys)
    types = re.findall(r"Expected an? (?:<class '([^']+)'>|([^\s<].*?)(?:\. Got value|\n|$))", innermost)
    expected = dict.fromkeys(_plain(quoted or other) for quoted, other in types)
    if not expected:
        return InvalidArgumentError(f"{where}: {innermost.strip()}")
    # A value of another type may always be null inside, and of a class that cannot be made there is nothing to learn:
    # worth saying only when nothing else is allowed.
    wanted = [name for name in expected if name != "null" and " is abstract" not in name] or list(expected)
    return InvalidArgumentError(f"{where}: expected {' or '.join(wanted)}, got {value!r}.")


def _plain(type_name: str) -> str:
    """The type as a user of YAML would call it."""
    if literal := re.match(r"typing\.Literal\[(.*)\]", type_name):
        return f"one of {literal[1]}"
    return {
        "NoneType": "null",
        "str": "text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
    }.get(type_name, type_name.removeprefix("typing."))


def _find(given: list[Entry], key: str) -> Entry | None:
    return next((entry for entry in reversed(given) if entry.key == key), None)


def _where(given: list[Entry], text: str) -> str:
    """``my.yaml, line 3: optimizer.class_path: `` for the last entry with this value."""
    exact = (entry for entry in reversed(given) if entry.text == text)
    # A class may have been given by its short name.
    short = (entry for entry in reversed(given) if entry.text == text.rpartition(".")[2])
    entry = next(exact, None) or next(short, None)
    return f"{entry.origin}: {entry.path}: " if entry else ""


def _did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The closest known name, compared first as a whole and then by its last part."""
    closest = difflib.get_close_matches(wrong, known, n=1, cutoff=0.75)
    if not closest:
        by_last = {name.rpartition(".")[2]: name for name in sorted(known, reverse=True)}
        closest = [by_last[n] for n in difflib.get_close_matches(wrong.rpartition(".")[2], by_last, n=1, cutoff=0.75)]
    return f" Did you mean {closest[0]}?" if closest else ""


def _subclasses(base: type) -> set[type]:
    """Every public class derived from ``base`` that has been imported."""
    found: set[type] = set()
    direct: list[type] = base.__subclasses__()
    for derived in direct:
        found |= {derived, *_subclasses(derived)}
    return {cls for cls in found if not cls.__name__.startswith("_")}


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _import(class_path: str) -> Any:
    module_name, _, class_name = class_path.rpartition(".")
    return getattr(importlib.import_module(module_name), class_name)
