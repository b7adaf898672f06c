"""Topics from a small library: the split keeps modules whole, classes are of one size, nothing is there twice."""

from pathlib import Path

import pytest
from stand_in import write_tokenizer

from lowbit_lightning.data import DocstringTopics
from lowbit_lightning.data.docstring_topics import split_by_module
from lowbit_lightning.data.labeled import Example
from lowbit_lightning.errors import CorpusError, InvalidArgumentError

REPEATED = "Returns what the caller asked for, in full."


@pytest.fixture
def library(tmp_path: Path) -> str:
    """Packages with 6 to 9 modules of 3 docstrings each, a single module, and what must be left out."""
    root = tmp_path / "library"
    for package, modules in (("alpha", 9), ("beta", 8), ("gamma", 7), ("delta", 6), ("small", 4), ("distutils", 9)):
        (root / package / "tests").mkdir(parents=True)
        for number in range(modules):
            texts = [f"In {package} {number} the thing {n} is described." for n in range(3)]
            bodies = [f'class C:\n    """{texts[1]}"""\n', f'async def f():\n    """{texts[2]}"""\n']
            shared = f'def g():\n    """{REPEATED}"""\n\ndef h():\n    """Too short."""\n'
            (root / package / f"m{number}.py").write_text(f'"""{texts[0]}"""\n' + "\n".join([*bodies, shared]))
            (root / package / "tests" / f"t{number}.py").write_text(f'"""A test of {package} and nothing else."""')
        (root / package / "torn.py").write_text("def f(:\n")
    (root / "single.py").write_text('"""A module on its own that is no package at all."""')
    return str(root)


def parts(root: str, **arguments: float) -> tuple[list[Example], list[Example]]:
    module = DocstringTopics("unused", num_topics=3, root=root, **arguments)  # type: ignore[arg-type]
    examples = module.load()
    return examples["train"], examples["validation"]


def test_the_largest_topics_are_chosen(library: str) -> None:
    for part in parts(library):
        assert {example.label for example in part} == {"alpha", "beta", "gamma"}


def test_every_topic_has_as_many_examples(library: str) -> None:
    for part in parts(library):
        counts = [sum(example.label == topic for example in part) for topic in ("alpha", "beta", "gamma")]
        assert len(set(counts)) == 1
        assert counts[0] >= 6


def test_a_module_is_in_one_part_only(library: str) -> None:
    train, validation = ({example.place for example in part} for part in parts(library))
    assert not train & validation


def test_docstrings_are_long_enough_and_occur_once(library: str) -> None:
    texts = [example.text for part in parts(library) for example in part]
    assert REPEATED not in texts
    assert "Too short." not in texts
    assert len(texts) == len(set(texts))


def test_topics_agree_with_their_texts(library: str) -> None:
    for part in parts(library):
        for example in part:
            assert example.text.startswith(f"In {example.label} ")


def test_the_split_does_not_depend_on_the_seed(library: str) -> None:
    assert parts(library, seed=0) == parts(library, seed=1)


def test_held_out_share_is_a_bound(library: str) -> None:
    modules = {f"m{n}": [f"{n} {k}" for k in range(5)] for n in range(10)}
    split = split_by_module(modules, 0.34)
    assert len(split["validation"]) == 15
    assert len(split["train"]) == 35


def test_one_module_is_held_out_at_least() -> None:
    split = split_by_module({"large": ["a"] * 9, "small": ["b"] * 2}, 0.1)
    assert split["validation"] == [("b", "small")] * 2


def test_batches(library: str, tmp_path: Path) -> None:
    module = DocstringTopics(write_tokenizer(tmp_path / "spelling"), num_topics=3, root=library, batch_size=4)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] <= module.max_length
    assert batch["labels"].shape == (4,)
    assert module.num_labels == 3


def test_too_few_topics(library: str) -> None:
    with pytest.raises(CorpusError, match=r"has 4 packages .* num_topics=5"):
        DocstringTopics("unused", num_topics=5, root=library).load()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot be read"):
        DocstringTopics("unused", root=str(tmp_path / "gone")).load()


def test_one_topic_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="num_topics=1 must"):
        DocstringTopics("unused", num_topics=1)
