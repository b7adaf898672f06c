"""Where every value of a run came from: the line of a YAML file, or the command line.

jsonargparse merges all ``--config`` files and options before it checks them, and its messages then name the key but no
longer the file. These functions read the same input once more, only after something went wrong, to say which line to
mend. They also turn the names of shipped configurations into their paths.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml  # type: ignore[import-untyped]

from lowbit_lightning import configs
from lowbit_lightning.errors import InvalidArgumentError


@dataclass(frozen=True)
class Entry:
    """One key of the configuration as the user wrote it.

    Attributes:
        path: Dotted, with list positions: ``trainer.callbacks[0].init_args.patience``.
        text: The value as written, empty for a nested value.
        origin: For the message: ``my.yaml, line 3`` or ``the command line``.
    """

    path: str
    text: str
    origin: str

    @property
    def key(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


def resolve_names(arguments: Sequence[str]) -> list[str]:
    """Replace the names of shipped configurations after ``--config`` and ``-c`` by their paths.

    Raises:
        InvalidArgumentError: A plain word that is neither a file nor a name.
    """
    resolved: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if resolved and resolved[-1] in ("--config", "-c"):
            resolved.append(_resolve(argument))
        elif equals and flag in ("--config", "-c"):
            resolved += ["--config", _resolve(value)]
        else:
            resolved.append(argument)
    return resolved


def _resolve(value: str) -> str:
    # Anything but a plain word is a path, or a configuration written out on the command line: jsonargparse's business.
    # A folder of that name, such as a logger makes, is no configuration.
    plain_word = re.fullmatch(r"[\w.+-]+", value) is not None
    is_other = not os.path.exists(value) or os.path.isdir(value)
    return str(configs.find(value)) if plain_word and is_other else value


def entries(arguments: Sequence[str]) -> list[Entry]:
    """Every key that the arguments give, in the order in which later ones win.

    Raises:
        InvalidArgumentError: A configuration file that cannot be read, is not YAML or holds no keys.
    """
    found: list[Entry] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        position += 1
        if not argument.startswith("-"):
            continue
        option, equals, value = argument.lstrip("-").partition("=")
        if not equals and re.match(r"-(?!\d)", following) is None:  # -1 is a value, -c an option
            value = following
            position += 1
        if option in ("c", "config"):
            found += _entries_of_file(value)
        else:
            found.append(Entry(option.rstrip("+"), value, "the command line"))
    return found


def _entries_of_file(name: str) -> list[Entry]:
    shown = os.path.relpath(name) if not os.path.relpath(name).startswith("..") else name
    try:
        with open(name, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgumentError(f"config file {name!r} cannot be read: {reason}.") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidArgumentError(f"config file {shown}, line {line} is not YAML: {error.problem}.") from error
    if root is None:
        raise InvalidArgumentError(f"config file {shown} is empty. `lowbit-lightning list` shows complete ones.")
    if not isinstance(root, yaml.MappingNode):
        raise InvalidArgumentError(
            f"config file {shown} must hold keys such as `model:` and `trainer:`, not {root.tag.rpartition(':')[2]}."
        )
    return list(_walk(root, "", shown))


def _walk(node: yaml.Node, path: str, file: str) -> Iterator[Entry]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = f"{path}.{key.value}" if path else str(key.value)
            below = below.rstrip("+")
            text = value.value if isinstance(value, yaml.ScalarNode) else ""
            yield Entry(below, text, f"{file}, line {key.start_mark.line + 1}")
            yield from _walk(value, below, file)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            below = f"{path}[{position}]"
            if isinstance(item, yaml.ScalarNode):
                yield Entry(below, item.value, f"{file}, line {item.start_mark.line + 1}")
            yield from _walk(item, below, file)
