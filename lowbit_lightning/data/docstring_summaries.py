"""A real task for sequence-to-sequence models that every machine already has: what does this function do?

The functions of Python's standard library come with a line of English on what they do. The model reads a function's
code, without its docstring, and writes that line. Whole modules are held out.
"""

import ast
import functools
import sysconfig
import textwrap
import warnings
from collections import Counter
from pathlib import Path

from lowbit_lightning.data.module import Part, progress_bar
from lowbit_lightning.data.pairs import Pair, TextPairs
from lowbit_lightning.data.python_source import python_files
from lowbit_lightning.data.split import is_validation
from lowbit_lightning.errors import CorpusError

# Shorter ones ("See above.") say nothing about the function.
_LEAST_WORDS = 3


class DocstringSummaries(TextPairs):
    """Functions of the standard library and the first sentence of their docstrings. Works offline.

    Summaries that occur in several places are left out. The task is the same for every seed and on every machine with
    the same Python.

    Args:
        tokenizer: ``bytes``, or path or name of a Hugging Face tokenizer, or ``package:NAME``.
        max_source_length: tokens of a function with its end; the rest of a longer one is left out.
        max_target_length: the same for summaries.
        batch_size: pairs per batch and device.
        val_fraction: expected share of modules held out for validation, between 0 and 1.
        seed: seed of the order in which training pairs are visited. The split does not depend on it.
        num_workers: processes that prepare batches. 0 is best here: texts are tokenized already.
        root: folder with .py files to use instead of the standard library.

    Raises:
        InvalidArgumentError: an argument is outside its range.
    """

    def __init__(
        self,
        tokenizer: str = "bytes",
        max_source_length: int = 192,
        max_target_length: int = 96,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        root: str | None = None,
    ) -> None:
        super().__init__(tokenizer, max_source_length, max_target_length, batch_size, val_fraction, seed, num_workers)
        self.root = Path(root).expanduser() if root is not None else Path(sysconfig.get_path("stdlib"))

    def load(self) -> dict[Part, list[Pair]]:
        """Read the functions of every module."""
        found = _read(self.root)
        count = Counter(pair.target for pairs in found.values() for pair in pairs)
        parts: dict[Part, list[Pair]] = {"train": [], "validation": []}
        for name, pairs in found.items():
            part: Part = "validation" if is_validation(name.encode(), self.val_fraction) else "train"
            parts[part] += (pair for pair in pairs if count[pair.target] == 1)
        for part, of_part in parts.items():
            if not of_part:
                raise CorpusError(
                    f"no documented function for {part}: '{self.root}' has {len(found)} .py files, val_fraction="
                    f"{self.val_fraction}. Change it, or give another folder with `root`; without one, the standard "
                    "library of the running Python is used, which must be installed as source files."
                )
        return parts


@functools.cache  # the library does not change while a process runs, and parsing it takes seconds
def _read(root: Path) -> dict[str, list[Pair]]:
    """The pairs of every module under ``root``, by its path."""
    files = python_files(root)
    found = {}
    with progress_bar("Reading functions", sum(files.values())) as bar:
        for name, size in files.items():
            found[name] = _pairs(root / name)
            bar.update(size)
    return found


def _pairs(path: Path) -> list[Pair]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser's opinions about somebody else's escape sequences
        try:
            text = path.read_bytes().decode(errors="replace")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # a few files are templates or of another Python
            return []
        except OSError as error:
            raise CorpusError(f"'{path}' cannot be read: {error.strerror}.") from error
    lines = text.splitlines()
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [
        Pair(code, summary, f"{path}:{node.lineno}")
        for node in functions
        if (summary := _summary(node)) and (code := _without_docstring(node, lines))
    ]


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The first sentence or paragraph of a function's docstring, on one line; nothing where it is too short."""
    docstring = (ast.get_docstring(node) or "").encode(errors="replace").decode()
    words = docstring.partition("\n\n")[0].split()
    end = next((i for i, word in enumerate(words, start=1) if word.endswith((".", ":"))), len(words))
    return " ".join(words[:end]) if end >= _LEAST_WORDS else ""


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The lines of a function but for its docstring; nothing where that is all of its body."""
    docstring, body = node.body[0], node.body[1:]
    if not body:
        return ""
    assert docstring.end_lineno is not None
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip()
