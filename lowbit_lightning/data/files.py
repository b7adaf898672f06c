"""Documents and rows out of files, one at a time: globs, six formats, and errors that name file, line and cure.

A ``.txt`` or ``.md`` file is one document; a ``.jsonl`` file has one per line and a ``.parquet`` file one per row, in a
field or column that the user names. Rows of several fields come from ``.csv`` and ``.tsv`` too. Everything here is
lazy: no more than one document (or one batch of parquet rows) is in memory at a time.
"""

import csv
import functools
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lowbit_lightning.errors import CorpusError

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")

# Rows of a parquet file decoded at a time.
PARQUET_ROWS = 256


class Cell(NamedTuple):
    """A value and where it stands, for messages."""

    value: object
    place: str


def find_files(patterns: Sequence[str], argument: str, suffixes: Sequence[str] = SUFFIXES) -> list[str]:
    """All files that match the glob patterns: sorted, each once, of a known format.

    Args:
        patterns: Globs or paths; ``**`` goes into subfolders and ``~`` is the home folder.
        argument: Name of the argument that holds the patterns, for messages.
        suffixes: The formats that will do.

    Raises:
        CorpusError: There are no patterns, one matches no file, or a file's format is unknown.
    """
    if not patterns:
        raise CorpusError(
            f"{argument} is empty: give at least one file or glob, such as {argument}: ['corpus/**/*{suffixes[0]}']."
        )
    found: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [path for path in matches if not os.path.isdir(path)]
        if not files:
            hint = (
                f"it matches only folders; to read what is in them write '{pattern.rstrip('/')}/**/*{suffixes[0]}'"
                if matches
                else f"check the spelling; relative paths start at {os.getcwd()}"
            )
            raise CorpusError(f"{argument}: no file matches '{pattern}': {hint}.")
        found.update(os.path.normpath(path) for path in files)
    for path in sorted(found):
        if _suffix(path) not in suffixes:
            raise CorpusError(
                f"{argument}: '{path}' is of an unknown format. Known suffixes: {', '.join(suffixes)}. "
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
    documents: Iterator[bytes]
    try:
        match _suffix(path):
            case ".jsonl":
                documents = (text_of(cell, "field") for (cell,) in _read_jsonl(path, {"field": field}))
            case ".parquet":
                documents = (text_of(cell, "field") for (cell,) in _read_parquet(path, {"field": field}))
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


def read_rows(path: str, fields: Mapping[str, str]) -> Iterator[list[Cell]]:
    """The rows of a .csv or .tsv (with a line of names), .jsonl or .parquet file, as the cells of the fields asked for.

    Args:
        path: The file.
        fields: Field or column to read, by the name of the argument that says so.

    Raises:
        CorpusError: The file cannot be read, or a line or column is not as described.
    """
    try:
        match _suffix(path):
            case ".csv":
                remedy = "Put values with commas or line ends in double quotes."
                yield from _read_table(path, fields, csv.reader, remedy)
            case ".tsv":
                # Quotes mean nothing in these: corpora of sentences are full of single ones.
                split = functools.partial(csv.reader, delimiter="\t", quoting=csv.QUOTE_NONE)
                yield from _read_table(path, fields, split, "Take tabs out of the values.")
            case ".jsonl":
                yield from _read_jsonl(path, fields)
            case _:
                yield from _read_parquet(path, fields)
    except OSError as error:
        raise CorpusError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _read_table(path: str, fields: Mapping[str, str], split: Any, remedy: str) -> Iterator[list[Cell]]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = split(file, strict=True)
        try:
            names: list[str] = next(rows, [])
            _check_names(f"'{path}': no column", "Columns", names, fields)
            positions = [names.index(field) for field in fields.values()]
            for row in rows:
                place = f"{path}:{rows.line_num}"
                if row and len(row) != len(names):
                    raise CorpusError(f"{place}: {len(row)} values, but line 1 names {len(names)} columns. {remedy}")
                if row:
                    yield [Cell(row[at], f"{place}: column '{names[at]}'") for at in positions]
        except csv.Error as error:
            raise CorpusError(f"{path}:{rows.line_num}: not {_suffix(path)[1:].upper()} ({error}).") from error


def _read_jsonl(path: str, fields: Mapping[str, str]) -> Iterator[list[Cell]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig", errors="replace").strip()
            if not text:
                continue
            place = f"{path}:{number}"
            try:
                record = json.loads(text)
            except ValueError as error:
                raise CorpusError(
                    f"{place}: not JSON ({error}). A .jsonl file has one JSON object per line."
                ) from error
            if not isinstance(record, dict):
                wanted = " and ".join(f"'{field}'" for field in fields.values())
                raise CorpusError(f"{place}: expected a JSON object with the field {wanted}, got {text[:40]}")
            _check_names(f"{place}: no field", "Fields", list(record), fields)
            yield [Cell(record[field], f"{place}: field '{field}'") for field in fields.values()]


def _read_parquet(path: str, fields: Mapping[str, str]) -> Iterator[list[Cell]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(f"'{path}' is a parquet file, which needs pyarrow: pip install pyarrow.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(f"'{path}': no column", "Columns", file.schema_arrow.names, fields)
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=sorted(set(fields.values()))):
                columns = [(field, batch.column(field).to_pylist()) for field in fields.values()]
                for at in range(batch.num_rows):
                    yield [
                        Cell(values[at], f"'{path}': row {row + at} of column '{field}'") for field, values in columns
                    ]
                row += batch.num_rows
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"'{path}' is not a readable parquet file: {error}.") from error


def text_of(cell: Cell, argument: str) -> bytes:
    """The text in a cell, nothing for null.

    Raises:
        CorpusError: It is no text. ``argument`` is the one that names the field.
    """
    value, place = cell
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise CorpusError(f"{place} is of type {type(value).__name__}, not text. Name another one with `{argument}`.")
    # JSON can spell half a surrogate pair, which UTF-8 cannot.
    return value.encode("utf-8", errors="replace")


def _check_names(missing: str, what: str, names: Sequence[str], fields: Mapping[str, str]) -> None:
    for argument, field in fields.items():
        if field not in names:
            listed = ", ".join(f"'{name}'" for name in names) or "none"
            raise CorpusError(f"{missing} '{field}'. {what} there: {listed}. Name the right one with `{argument}`.")


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
