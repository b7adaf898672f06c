"""What a user gets for a corpus that cannot be used: the path, what was found, and what to do."""

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lowbit_lightning.data import PythonSource, TextFiles
from lowbit_lightning.errors import CorpusError, InvalidArgumentError


def failure(*train: object, **arguments: Any) -> str:
    module = TextFiles(train=[str(pattern) for pattern in train], **arguments)
    with pytest.raises(CorpusError) as caught:
        module.setup("fit")
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_glob_that_matches_nothing_is_named_with_its_argument(tmp_path: Path, corpus: Path) -> None:
    assert f"train: no file matches '{tmp_path}/*.md'" in failure(f"{tmp_path}/*.md")
    assert "val: no file matches" in failure(f"{corpus}/*", val=[f"{tmp_path}/*.md"])


def test_no_globs_at_all() -> None:
    assert "train is empty" in failure()


def test_a_folder_gets_the_glob_that_was_meant(tmp_path: Path) -> None:
    assert f"write '{tmp_path}/**/*.txt'" in failure(tmp_path)


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    message = failure(write(tmp_path / "a.pdf", "text"))
    assert "a.pdf" in message
    assert ".txt, .md, .jsonl, .parquet" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_files(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "a.txt", "")
    message = failure(path, val=[str(write(tmp_path / "b.txt", "text"))], streaming=streaming)
    assert "no train text" in message
    assert str(path) in message
    assert "empty" in message


def test_only_empty_files(tmp_path: Path) -> None:
    assert "every document is empty" in failure(write(tmp_path / "a.txt", ""))


@pytest.mark.parametrize("streaming", [False, True])
def test_too_short_for_one_sequence_tells_both_lengths(tmp_path: Path, streaming: bool) -> None:
    train, val = write(tmp_path / "a.txt", "0123456789"), write(tmp_path / "b.txt", "text")
    message = failure(train, val=[str(val)], seq_len=64, streaming=streaming)
    assert "the train text is shorter than one sequence: 12 tokens" in message
    assert "seq_len=64" in message
    assert str(train) in message


@pytest.mark.parametrize("streaming", [False, True])
def test_one_document_cannot_be_split(tmp_path: Path, streaming: bool) -> None:
    message = failure(write(tmp_path / "a.txt", "some text" * 10), seq_len=8, streaming=streaming)
    assert "no document for validation" in message
    assert "val_fraction=0.05" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreadable_file(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "broken.txt"
    path.symlink_to(tmp_path / "gone.txt")
    assert f"'{path}' cannot be read" in failure(path, streaming=streaming)


def test_a_file_in_both_parts(corpus: Path) -> None:
    assert "a.txt' is matched by both train and val" in failure(f"{corpus}/*", val=[f"{corpus}/a.txt"])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "not JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"body": "b", "title": "t"}', "no field 'text'. Fields there: 'body', 'title'"),
        ('{"text": 3}', "field 'text' is of type int, not text"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    message = failure(path)
    assert f"{path}:3" in message
    assert complaint in message


def test_a_missing_column_lists_those_there(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["b"], "title": ["t"]}), tmp_path / "a.parquet")
    assert "no column 'text'. Columns there: 'body', 'title'" in failure(tmp_path / "a.parquet")


def test_a_column_of_numbers(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "row 0 of column 'text' is of type int, not text" in failure(tmp_path / "a.parquet")


def test_a_torn_parquet_file(tmp_path: Path) -> None:
    assert "not a readable parquet file" in failure(write(tmp_path / "a.parquet", "PAR1 and then nothing"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in failure(write(tmp_path / "a.parquet", ""))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("seq_len", 1), ("batch_size", 0), ("num_workers", -1), ("val_fraction", 0.0), ("val_fraction", 1.0)],
)
def test_arguments_out_of_range_are_named(argument: str, value: float) -> None:
    arguments: dict[str, Any] = {argument: value}
    for make in (PythonSource, lambda **given: TextFiles(train=["corpus"], **given)):
        with pytest.raises(InvalidArgumentError, match=f"{argument}={value} must"):
            make(**arguments)
