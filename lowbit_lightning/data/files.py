"""Documents out of text files, one at a time: globs, four formats, and errors that name file, line and cure.

A ``.txt`` or ``.md`` file is one document; a ``.jsonl`` file has one per line and a ``.parquet`` file one per row, in a
field or column that the user names. Everything here is lazy: no more than one document (or one batch of parquet rows)
is in memory at a time.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence

from lowbit_lightning.errors import CorpusError

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")

# Rows of a parquet file decoded at a time.
PARQUET_ROWS = 256


def find_files(patterns: Sequence[str], argument: str) -> list[str]:
    """All files that match the glob patterns: sorted, each once, of a known format.

    Args:
        patterns: Globs or paths; ``**`` goes into subfolders and ``~`` is the home folder.
        argument: Name of the argument that holds the patterns, for messages.

    Raises:
        CorpusError: There are no patterns, one matches no file, or a file's format is unknown.
    """
    if not patterns:
        raise CorpusError(
            f"{argument} is empty: give at least one file or glob, such as {argument}: ['corpus/**/*.txt']."
        )
    found: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [path for path in matches if not os.path.isdir(path)]
        if not files:
            hint = (
                f"it matches only folders; to read what is in them write '{pattern.rstrip('/')}/**/*.txt'"
                if matches
                else f"check the spelling; relative paths start at {os.getcwd()}"
            )
            raise CorpusError(f"{argument}: no file matches '{pattern}': {hint}.")
        found.update(os.path.normpath(path) for path in files)
    for path in sorted(found):
        if _suffix(path) not in SUFFIXES:
            raise CorpusError(
                f"{argument}: '{path}' is of an unknown format. Known suffixes: {', '.join(SUFFIXES)}. "
                "Rename the file or narrow the glob."
            )
    return sorted(found)


def read_documents(path: str, field: str, max_text_bytes: int | None = None) -> Iterator[bytes]:
    """The documents of one file in order, as UTF-8 wherever the format implies it. Empty documents are left out.

    Args:
        path: A file whose suffix :func:`find_files` accepted.
        field: Field of .jsonl or column of .parquet with the text.
        max_text_bytes: Cut a .txt or .md file into documents of about this size, at line ends where there are any, so
            that a file larger than memory can be read. None: the file is one document.

    Raises:
        CorpusError: The file cannot be read, or a line or column is not as described.
    """
    try:
        match _suffix(path):
            case ".jsonl":
                documents = _read_jsonl(path, field)
            case ".parquet":
                documents = _read_parquet(path, field)
            case _:
                documents = _read_text(path, max_text_bytes)
        yield from (document for document in documents if document)
    except OSError as error:
        raise CorpusError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _read_text(path: str, max_bytes: int | None) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if max_bytes is None:
            yield file.read()
            return
        while part := file.read(max_bytes):
            # A line end within reach keeps words and characters whole; text without lines is cut where it is.
            yield part + file.readline(max_bytes)


def _read_jsonl(path: str, field: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig", errors="replace").strip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise CorpusError(
                    f"{path}:{number}: not JSON ({error}). A .jsonl file has one JSON object per line."
                ) from error
            if not isinstance(record, dict):
                raise CorpusError(f"{path}:{number}: expected a JSON object with the field '{field}', got {text[:40]}")
            if field not in record:
                raise CorpusError(f"{path}:{number}: no field '{field}'. {_name_them('Fields', list(record))}")
            yield _text_of(record[field], f"{path}:{number}: field '{field}'")


def _read_parquet(path: str, field: str) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(f"'{path}' is a parquet file, which needs pyarrow: pip install pyarrow.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise CorpusError(f"'{path}': no column '{field}'. {_name_them('Columns', columns)}")
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text_of(value, f"'{path}': row {row} of column '{field}'")
                    row += 1
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"'{path}' is not a readable parquet file: {error}.") from error


def _text_of(value: object, place: str) -> bytes:
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise CorpusError(f"{place} is of type {type(value).__name__}, not text. Name another one with `field`.")
    # JSON can spell half a surrogate pair, which UTF-8 cannot.
    return value.encode("utf-8", errors="replace")


def _name_them(what: str, names: list[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names) or "none"
    return f"{what} there: {listed}. Name the one with the text with `field`."


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
