"""The YAML files that ship with the package, found by name.

``recipes/`` holds complete runs, ``techniques/`` holds overlays that add one technique to any run. Their first line is
a comment that says what they are; ``lowbit-lightning list`` shows it. Imports nothing heavy: ``list`` and ``cp`` answer
without loading torch.
"""

import difflib
from pathlib import Path

from lowbit_lightning.errors import InvalidArgumentError

KINDS = ("recipes", "techniques")


def shipped(kind: str) -> dict[str, Path]:
    """The shipped files of one kind, ``"recipes"`` or ``"techniques"``, by name and in alphabetical order."""
    return {path.stem: path for path in sorted((Path(__file__).parent / kind).glob("*.yaml"))}


def find(name: str) -> Path:
    """The shipped file called ``name``, with or without its ``.yaml``.

    Raises:
        InvalidArgumentError: No recipe or technique has this name; the message offers the closest ones.
    """
    every = {stem: path for kind in KINDS for stem, path in shipped(kind).items()}
    stem = name.removesuffix(".yaml")
    if stem in every:
        return every[stem]
    closest = difflib.get_close_matches(stem, every, n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(closest)}?" if closest else ""
    raise InvalidArgumentError(
        f"config {name!r} is neither a file nor the name of a shipped configuration.{guess}"
        " `lowbit-lightning list` shows every name."
    )


def description(path: Path) -> str:
    """The one-line description of a configuration: its first line, a comment, without the ``#``."""
    with path.open(encoding="utf-8") as lines:
        first = next(lines, "").strip()
    return first.lstrip("# ") if first.startswith("#") else ""
