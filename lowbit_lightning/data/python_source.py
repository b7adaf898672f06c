"""A real corpus that every machine already has: the source code of Python's standard library.

About 12 MB of text written by people, present wherever this package runs, so a first training run needs no download.
Bytes are the tokens. The library's tests are left out (they are large tables and near-copies), and so are installed
packages, which differ from machine to machine.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lowbit_lightning.data.module import PackedText, Part, progress_bar
from lowbit_lightning.data.packing import Prompts, Windows
from lowbit_lightning.data.split import is_validation
from lowbit_lightning.data.tokens import ByteTokens
from lowbit_lightning.errors import CorpusError, InvalidArgumentError


class PythonSource(PackedText):
    """Byte-level language modelling on Python's standard library. Works offline.

    Files are held out by a hash of their path within the library, so the split is the same on every machine with the
    same Python and for every seed.

    Args:
        seq_len: Bytes per window, at least 2.
        batch_size: Windows per batch and device.
        val_fraction: Expected share of files held out for validation, between 0 and 1.
        seed: Seed of the order in which training windows are visited. The split does not depend on it.
        num_workers: Processes that prepare batches. 0 is best here: a batch is one slice of an array.
        max_bytes: Use only about this much text, whole files picked evenly over the library, for quick runs.
        root: Folder with .py files to use instead of the standard library.

    Raises:
        InvalidArgumentError: An argument is outside its range.
    """

    def __init__(
        self,
        seq_len: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        max_bytes: int | None = None,
        root: str | None = None,
    ) -> None:
        super().__init__(seq_len, batch_size, val_fraction, seed, num_workers, shuffle=True)
        if max_bytes is not None and max_bytes < 1:
            raise InvalidArgumentError(f"max_bytes={max_bytes} must be at least 1, or null for all of the corpus.")
        self.max_bytes = max_bytes
        self.root = Path(root).expanduser() if root is not None else Path(sysconfig.get_path("stdlib"))
        self._tokens = ByteTokens()
        self._windows: dict[Part, Windows] = {}

    @property
    def tokens(self) -> ByteTokens:
        """Bytes, with 0 at the end of a file."""
        return self._tokens

    def load(self) -> Prompts:
        """Read the files and pack both parts."""
        files = python_files(self.root)
        if not files:
            raise CorpusError(
                f"no .py files in '{self.root}'. Give another folder with `root`; without one, the standard library of "
                "the running Python is used, which must be installed as source files."
            )
        budgets: dict[Part, float | None] = {"train": None, "validation": None}
        if self.max_bytes is not None:
            budgets = {
                "train": self.max_bytes * (1 - self.val_fraction),
                "validation": self.max_bytes * self.val_fraction,
            }
        for part, budget in budgets.items():
            held_out = part == "validation"
            names = [name for name in files if is_validation(name.encode(), self.val_fraction) is held_out]
            if budget is not None:
                names = _within_budget({name: files[name] for name in names}, budget)
            if not names:
                raise CorpusError(
                    f"no file for {part}: '{self.root}' has {len(files)} .py files with text, val_fraction="
                    f"{self.val_fraction}, max_bytes={self.max_bytes}. Change val_fraction, or allow more bytes."
                )
            with progress_bar(f"Reading {part} files", sum(files[name] for name in names)) as bar:
                documents = []
                for name in names:
                    documents.append(_read(self.root / name))
                    bar.update(len(documents[-1]))
            stream = self.encode_in_memory(documents, part)
            self._windows[part] = self.windows(stream, part, f"{len(names)} files in '{self.root}'")
        return self.make_prompts(stream)

    def dataset(self, part: Part) -> Windows:
        """The windows of one part, in memory."""
        return self._windows[part]


def python_files(root: Path) -> dict[str, int]:
    """Paths of .py files with text in them, relative to ``root`` with forward slashes, and their sizes in bytes.

    Sorted by path, whatever order the file system lists them in. Folders of tests and of installed packages are left
    out, and links to folders are not followed.
    """

    def walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if not _is_left_out(entry.name):
                        yield from walk(entry.path, f"{prefix}{entry.name}/")
                elif entry.name.endswith(".py") and entry.is_file() and (size := entry.stat().st_size) > 0:
                    yield f"{prefix}{entry.name}", size

    try:
        return dict(sorted(walk(str(root), "")))
    except OSError as error:
        raise CorpusError(f"'{error.filename}' cannot be read: {error.strerror}. Give a folder with `root`.") from error


def _is_left_out(folder: str) -> bool:
    is_test = folder in ("test", "tests") or folder.startswith("test_") or folder.endswith("_test")
    return is_test or folder in ("site-packages", "dist-packages", "__pycache__")


def _within_budget(sizes: dict[str, int], budget: float) -> list[str]:
    """Files that together hold at most ``budget`` bytes, visited in the order of a hash to favour no folder."""
    chosen = []
    for name in sorted(sizes, key=lambda name: hashlib.blake2b(name.encode(), person=b"lowbit budget").digest()):
        if sizes[name] <= budget:
            budget -= sizes[name]
            chosen.append(name)
    return sorted(chosen)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"'{path}' cannot be read: {error.strerror}.") from error
