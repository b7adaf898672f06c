"""Rows of three formats as batches, the split, prompts that survive truncation, and errors that name the row."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from stand_in import VOCABULARY, write_tokenizer

from lowbit_lightning.data import LabeledText
from lowbit_lightning.data.split import is_validation
from lowbit_lightning.errors import CorpusError, InvalidArgumentError

ROWS = [(f'number {n}, "quoted"\nsecond line', "ham" if n % 3 else "spam") for n in range(60)]


@pytest.fixture(scope="session")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("spelling"))


def write(path: Path, rows: list[tuple[Any, Any]]) -> str:
    records = [{"id": n, "text": text, "label": label} for n, (text, label) in enumerate(rows)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        lines = ['{},"{}",{}'.format(n, text.replace('"', '""'), label) for n, (text, label) in enumerate(rows)]
        path.write_text("\n".join(["id,text,label", *lines]))
    return str(path)


def ready(**arguments: Any) -> LabeledText:
    module = LabeledText(**arguments)
    module.setup("fit")
    return module


def spelled(row: Any) -> str:
    """The text behind a row of tokens, without the spaces that the tokenizer does not keep."""
    return "".join(VOCABULARY[token].removeprefix("##") for token in row if token > 0)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_batches_hold_every_row_with_its_label(tmp_path: Path, spelling: str, suffix: str) -> None:
    train = write(tmp_path / f"train{suffix}", ROWS)
    val = write(tmp_path / f"val{suffix}", ROWS[:7])
    module = ready(train=[train], val=[val], tokenizer=spelling, batch_size=4)
    assert module.label_names == ["ham", "spam"]
    batches = list(module.val_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [4, 3]
    found = [
        (spelled(row), module.label_names[label])
        for batch in batches
        for row, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]
    assert found == [(f"[CLS]{''.join(text.split())}[SEP]", label) for text, label in ROWS[:7]]
    assert sum(len(batch["labels"]) for batch in module.train_dataloader()) == 60


def test_the_mask_marks_what_is_not_padding(tmp_path: Path, spelling: str) -> None:
    train = write(tmp_path / "a.csv", [("a", 0), ("abcdef", 1)])
    module = ready(train=[train], val=[write(tmp_path / "b.csv", [("a", 0), ("abcdef", 1)])], tokenizer=spelling)
    (batch,) = module.val_dataloader()
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8]
    assert batch["input_ids"][0, 3:].tolist() == [0] * 5


def test_the_split_is_by_content(tmp_path: Path, spelling: str) -> None:
    module = ready(train=[write(tmp_path / "a.csv", ROWS)], tokenizer=spelling, val_fraction=0.3)
    expected = sum(is_validation(text.encode(), 0.3) for text, _ in ROWS)
    assert sum(len(batch["labels"]) for batch in module.val_dataloader()) == expected > 5


def test_training_order_is_a_function_of_seed_and_epoch(tmp_path: Path, spelling: str) -> None:
    train = write(tmp_path / "a.csv", ROWS)

    def order(seed: int, epoch: int) -> list[str]:
        loader = ready(train=[train], tokenizer=spelling, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        return [spelled(row) for batch in loader for row in batch["input_ids"].tolist()]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, -1], ["-1", "9", "10"]),
        ([1.0, 0.0, 2.0], ["0", "1", "2"]),
        (["b", "10", "9"], ["9", "10", "b"]),
        ([True, False, True], ["False", "True"]),
    ],
)
def test_labels_are_ordered_by_value(tmp_path: Path, spelling: str, labels: list[Any], names: list[str]) -> None:
    rows = [(f"text {n}", label) for n, label in enumerate(labels)]
    path = tmp_path / "a.jsonl"
    module = ready(train=[write(path, rows)], val=[write(tmp_path / "b.jsonl", rows)], tokenizer=spelling)
    assert module.label_names == names


@pytest.mark.parametrize("prompt", ["{text}", "review: {text} it was", "{text} so"])
def test_truncation_takes_from_the_text_and_nothing_from_the_prompt(tmp_path: Path, spelling: str, prompt: str) -> None:
    text = "abcdefghij" * 9
    rows = [(text, 0), ("short", 1)]
    module = ready(
        train=[write(tmp_path / "a.csv", rows)], val=[write(tmp_path / "b.csv", rows)], tokenizer=spelling,
        prompt=prompt, max_length=32,
    )  # fmt: skip
    (batch,) = module.val_dataloader()
    before, after = prompt.replace(" ", "").split("{text}")
    kept = 32 - 2 - len(before) - len(after)
    assert spelled(batch["input_ids"][0].tolist()) == f"[CLS]{before}{text[:kept]}{after}[SEP]"
    assert spelled(batch["input_ids"][1].tolist()) == f"[CLS]{before}short{after}[SEP]"


def failure(path: Path, content: str, tokenizer: str, **arguments: Any) -> str:
    path.write_text(content)
    with pytest.raises(CorpusError) as caught:
        ready(train=[str(path)], tokenizer=tokenizer, val_fraction=0.5, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "text,label\nfine,0\n,1\n", "a.csv:3: column 'text' is empty"),
        ("a.csv", "text,label\nfine,0\nnone,\n", "a.csv:3: column 'label' is empty"),
        ("a.csv", "text,label\nfine,0\none, two,1\n", "a.csv:3: 3 values, but line 1 names 2 columns"),
        ("a.csv", 'text,label\nfine,0\n"open,1\n', "a.csv:3: not CSV"),
        ("a.csv", "body,label\nfine,0\n", "a.csv': no column 'text'. Columns there: 'body', 'label'"),
        ("a.csv", "", "a.csv': no column 'text'. Columns there: none"),
        ("a.jsonl", '{"text": "fine", "label": 0.5}', "a.jsonl:1: field 'label' is '0.5'"),
        ("a.jsonl", '{"text": "fine", "label": null}', "a.jsonl:1: field 'label' is empty"),
        ("a.jsonl", '{"text": "fine", "label": [1]}', "a.jsonl:1: field 'label' is '[1]'"),
        ("a.jsonl", '{"text": 3, "label": 0}', "a.jsonl:1: field 'text' is of type int, not text"),
        ("a.jsonl", '{"text": "fine"}', "a.jsonl:1: no field 'label'"),
        ("a.jsonl", "[1]", "a.jsonl:1: expected a JSON object with the field 'text' and 'label'"),
        ("a.txt", "text", "a.txt' is of an unknown format. Known suffixes: .csv, .jsonl, .parquet"),
        ("a.csv", "text,label\n", "no example for train"),
        ("a.csv", "text,label\none,0\n", "no example for"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, spelling: str, name: str, content: str, complaint: str) -> None:
    assert complaint in failure(tmp_path / name, content, spelling)


def test_the_argument_that_names_the_field_is_named(tmp_path: Path, spelling: str) -> None:
    assert "`label_field`" in failure(tmp_path / "a.csv", "text,class\nfine,0\n", spelling)
    assert "`text_field`" in failure(tmp_path / "a.csv", "body,label\nfine,0\n", spelling)


def test_one_label_is_none_to_learn(tmp_path: Path, spelling: str) -> None:
    val = write(tmp_path / "val.csv", [("other", 0)])
    assert "have 1 label ('0')" in failure(tmp_path / "a.csv", "text,label\na,0\nb,0\n", spelling, val=[val])


def test_a_label_that_training_lacks(tmp_path: Path, spelling: str) -> None:
    val = write(tmp_path / "val.csv", [("other", 7)])
    message = failure(tmp_path / "a.csv", "text,label\na,0\nb,1\n", spelling, val=[val])
    assert "val.csv:2: column 'label': the validation label '7' is not among the training labels: '0', '1'" in message


def test_a_file_in_both_parts(tmp_path: Path, spelling: str) -> None:
    path = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(CorpusError, match="matched by both train and val"):
        ready(train=[path], val=[path], tokenizer=spelling)


def test_a_prompt_longer_than_an_example(tmp_path: Path, spelling: str) -> None:
    message = failure(
        tmp_path / "a.csv", "text,label\na,0\nb,1\n", spelling, val=[write(tmp_path / "b.csv", [("a", 0)])],
        prompt="a long story: {text}", max_length=12,
    )  # fmt: skip
    assert "the prompt alone takes 13 tokens" in message


@pytest.mark.parametrize(
    ("argument", "value"),
    [("max_length", 3), ("batch_size", 0), ("num_workers", -1), ("val_fraction", 1.0), ("prompt", "no place for it")],
)
def test_arguments_out_of_range_are_named(argument: str, value: Any) -> None:
    given: dict[str, Any] = {argument: value}
    with pytest.raises(InvalidArgumentError, match=f"{argument}={value!r} must"):
        LabeledText(train=["a.csv"], tokenizer="nowhere", **given)


def test_a_tokenizer_in_a_missing_package_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="pip install --no-deps no-such-model"):
        ready(train=[write(tmp_path / "a.csv", ROWS)], tokenizer="package:no_such_model")
