"""Pairs of texts as batches: from files of four formats and from a library's functions, in bytes and in tokens."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from torch import Tensor

from lowbit_lightning.data import DocstringSummaries, ParallelText
from lowbit_lightning.data.pairs import PairBytes, PairTokenizer, TextPairs
from lowbit_lightning.data.split import is_validation
from lowbit_lightning.errors import CorpusError, InvalidArgumentError

ROWS = [(f'le numéro "{n}", c\'est ça', f"number {n}, that's it") for n in range(40)]


def write(path: Path, rows: list[tuple[Any, Any]] = ROWS) -> str:
    records = [{"id": n, "fr": source, "en": target} for n, (source, target) in enumerate(rows)]
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, records)))
        case ".tsv":
            path.write_text("\n".join(["id\tfr\ten", *(f"{n}\t{fr}\t{en}" for n, (fr, en) in enumerate(rows))]))
        case _:
            quoted = ('{},"{}","{}"'.format(n, fr.replace('"', '""'), en) for n, (fr, en) in enumerate(rows))
            path.write_text("\n".join(["id,fr,en", *quoted]))
    return str(path)


def ready(**arguments: Any) -> ParallelText:
    module = ParallelText(**{"source_field": "fr", "target_field": "en", "batch_size": 4} | arguments)
    module.setup("fit")
    return module


def texts(module: TextPairs, batch: dict[str, Tensor]) -> list[tuple[str, str]]:
    sources = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    targets = [row[row >= 0] for row in batch["labels"]]
    return [(module.decode(source), module.decode(target)) for source, target in zip(sources, targets, strict=True)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_batches_hold_every_pair(tmp_path: Path, suffix: str) -> None:
    module = ready(train=[write(tmp_path / f"a{suffix}")], val=[write(tmp_path / f"b{suffix}", ROWS[:6])])
    batches = list(module.val_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [4, 2]
    assert [pair for batch in batches for pair in texts(module, batch)] == ROWS[:6]
    assert sum(int(batch["num_bytes"].sum()) for batch in batches) == sum(len(en.encode()) for _, en in ROWS[:6])
    assert sum(len(batch["labels"]) for batch in module.train_dataloader()) == 40


def test_what_is_padding_is_masked_and_predicts_nothing(tmp_path: Path) -> None:
    rows = [("ab", "x"), ("abcd", "wxyz")]
    module = ready(train=[write(tmp_path / "a.tsv", rows)], val=[write(tmp_path / "b.tsv", rows)])
    (batch,) = module.val_dataloader()
    assert batch["input_ids"].tolist() == [[*b"ab", 1, 0, 0], [*b"abcd", 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[*b"x", 1, -100, -100, -100], [*b"wxyz", 1]]


def test_long_texts_lose_their_end_and_keep_the_end_token(tmp_path: Path) -> None:
    module = ready(train=[write(tmp_path / "a.tsv")], max_source_length=6, max_target_length=4, val_fraction=0.5)
    batch = next(iter(module.val_dataloader()))
    assert batch["input_ids"].shape == (4, 6)
    assert set(batch["input_ids"][:, -1].tolist()) == set(batch["labels"][:, -1].tolist()) == {1}
    assert batch["num_bytes"].tolist() == [3] * 4


def test_all_targets_of_a_source_are_in_one_part(tmp_path: Path) -> None:
    rows = [(source, f"{target} {n}") for source, target in ROWS for n in range(3)]
    parts = ready(train=[write(tmp_path / "a.tsv", rows)], val_fraction=0.3).load()
    train, validation = ({pair.source for pair in of_part} for of_part in parts.values())
    assert not train & validation
    assert validation == {source for source, _ in ROWS if is_validation(source.encode(), 0.3)}


def test_a_tokenizer_encodes_and_decodes_both_sides(tmp_path: Path, tokenizer_path: str) -> None:
    module = ready(
        train=[write(tmp_path / "a.jsonl")], val=[write(tmp_path / "b.jsonl", ROWS[:2])], tokenizer=tokenizer_path
    )
    (batch,) = module.val_dataloader()
    assert texts(module, batch) == ROWS[:2]
    assert batch["num_bytes"].tolist() == [len(en.encode()) for _, en in ROWS[:2]]
    tokens = module.tokens
    assert isinstance(tokens, PairTokenizer)
    cut, num_bytes = tokens.encode("naïve café", 4)
    assert len(cut) == 4
    assert cut[-1] == tokens.end
    assert 0 < num_bytes < len("naïve café".encode())
    assert module.vocab_size > tokens.end


def test_bytes_that_mean_something_else_are_left_out() -> None:
    assert PairBytes().encode("a\0b\1c", 10) == ([*b"abc", 1], 3)
    assert PairBytes().decode([*b"ab", 300, 1, *b"c"]) == "ab"


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([("a", "b"), ("", "c")], {}, r"a.tsv:3: column 'fr' is empty: a pair has two sides"),
        ([("a", "b"), ("c", " ")], {}, r"a.tsv:3: column 'en' is empty"),
        ([("a\tb", "c")], {}, r"a.tsv:2: 4 values, but line 1 names 3 columns. Take tabs out of the values."),
        (ROWS, {"target_field": "de"}, "Name the right one with `target_field`"),
        (ROWS[:1], {"val_fraction": 0.999}, "there is no pair for train"),
    ],
)
def test_rows_that_are_no_pairs_are_named(
    tmp_path: Path, rows: list[tuple[str, str]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        ready(train=[write(tmp_path / "a.tsv", rows)], **arguments)


def test_a_file_is_in_one_part_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv")
    with pytest.raises(CorpusError, match="is matched by both train and val"):
        ready(train=[path], val=[path])


@pytest.mark.parametrize(
    "arguments", [{"max_source_length": 1}, {"max_target_length": 0}, {"batch_size": 0}, {"val_fraction": 1.0}]
)
def test_arguments_outside_their_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        ParallelText(train=["unused.tsv"], **arguments)


LIBRARY = '''
def add(a, b):
    """Add two numbers. They may be of any kind.

    More words.
    """
    return a + b


class C:
    async def wait(self):
        """Wait until something happens:

        - this
        """
        # A comment stays.
        await self

    def short(self):
        """Too short."""
        return 1

    def nothing_else(self):
        """Has no code but its docstring."""

    def undocumented(self):
        return 2
'''


def test_a_function_without_its_docstring_goes_with_the_first_sentence_of_it(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"m{number}.py").write_text(LIBRARY.replace("two numbers", f"two numbers ({number})"))
    (tmp_path / "torn.py").write_text("def f(:\n")
    module = DocstringSummaries(root=str(tmp_path), val_fraction=0.3, batch_size=2)
    parts = module.load()
    pairs = parts["train"] + parts["validation"]
    # What is said alike in all modules is left out.
    assert {pair.target for pair in pairs} == {f"Add two numbers ({number})." for number in range(30)}
    assert {pair.source for pair in pairs} == {"def add(a, b):\n    return a + b"}
    assert len(parts["validation"]) == sum(is_validation(f"m{number}.py".encode(), 0.3) for number in range(30)) > 0
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "m.py").write_text(LIBRARY)
    alone = DocstringSummaries(root=str(tmp_path / "one"))
    with pytest.raises(CorpusError, match="no documented function for"):
        alone.load()


def test_methods_are_taken_out_of_their_class(tmp_path: Path) -> None:
    from lowbit_lightning.data.docstring_summaries import _pairs

    (tmp_path / "m.py").write_text(LIBRARY)
    wait = next(pair for pair in _pairs(tmp_path / "m.py") if "wait" in pair.source)
    assert wait.source == "async def wait(self):\n    # A comment stays.\n    await self"
    assert wait.target == "Wait until something happens:"
    assert len(_pairs(tmp_path / "m.py")) == 2
