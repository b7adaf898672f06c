"""The four formats, the split, and what a batch holds."""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowbit_lightning.data import TextFiles
from lowbit_lightning.data.files import find_files, read_documents
from lowbit_lightning.data.split import is_validation

TEXTS = ["one, naïve", "two, 数据", "three"]


def ready(**arguments: Any) -> TextFiles:
    module = TextFiles(**arguments)
    module.setup("fit")
    return module


def predicted_text(batches: Iterable[dict[str, Tensor]]) -> list[bytes]:
    """Documents back from windows, whose predicted tokens must follow each other."""
    rows = [row for batch in batches for row in batch["input_ids"][:, 1:].tolist()]
    return [document for document in bytes(token for row in rows for token in row).split(b"\0") if document]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".parquet"])
def test_documents_of_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    expected = [text.encode() for text in TEXTS]
    if suffix == ".jsonl":
        lines = [json.dumps({"body": text}) for text in TEXTS]
        path.write_text("\n\n".join([*lines, '{"body": ""}', '{"body": null}']))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"other": [1, 2, 3, 4], "body": [*TEXTS, None]}), path)
    else:
        path.write_text("".join(TEXTS))
        expected = ["".join(TEXTS).encode()]
    assert list(read_documents(str(path), "body")) == expected


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "marked"}\n')
    assert list(read_documents(str(tmp_path / "a.jsonl"), "text")) == [b"marked"]


def test_globs_are_sorted_recursive_and_give_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_files([f"{tmp_path}/**/*.*", f"{tmp_path}/a.txt"], "train")
    assert [Path(path).name for path in found] == ["a.txt", "b.txt", "c.md"]


def test_the_split_is_disjoint_complete_and_by_content(corpus: Path) -> None:
    module = ready(train=[f"{corpus}/*"], val_fraction=0.2, seq_len=2, shuffle=False)
    train, val = predicted_text(module.train_dataloader()), predicted_text(module.val_dataloader())
    files = sorted(corpus.iterdir())
    everything = [document for path in files for document in read_documents(str(path), "text")]
    assert val == [document for document in everything if is_validation(document, 0.2)]
    # The last training batch is short and dropped.
    expected = [document for document in everything if not is_validation(document, 0.2)]
    assert train[:-1] == expected[: len(train) - 1]
    assert len(train) >= len(expected) - 1
    assert 10 < len(val) < 40


def test_a_new_file_moves_no_document_to_the_other_part(corpus: Path) -> None:
    before = set(predicted_text(ready(train=[f"{corpus}/*"], seq_len=2).val_dataloader()))
    (corpus / "0.txt").write_text("a new document in front of all others")
    after = set(predicted_text(ready(train=[f"{corpus}/*"], seq_len=2).val_dataloader()))
    assert before <= after


def test_validation_globs_replace_the_split(corpus: Path) -> None:
    module = ready(train=[f"{corpus}/*.jsonl"], val=[f"{corpus}/*.txt"], seq_len=2)
    expected = [(corpus / name).read_bytes() for name in ("a.txt", "b.txt")]
    assert predicted_text(module.val_dataloader()) == expected


def test_validation_drops_no_window(corpus: Path) -> None:
    module = ready(train=[f"{corpus}/*"], val_fraction=0.2, seq_len=16, batch_size=7)
    loader = module.val_dataloader()
    windows = sum(len(batch["input_ids"]) for batch in loader)
    assert windows == len(module.dataset("validation"))  # type: ignore[arg-type]
    assert windows % 7, "the case needs a short last batch"


def test_training_batches_are_full_unless_there_is_only_one(corpus: Path) -> None:
    full = ready(train=[f"{corpus}/*"], val_fraction=0.2, seq_len=16, batch_size=7)
    assert {len(batch["input_ids"]) for batch in full.train_dataloader()} == {7}
    large = ready(train=[f"{corpus}/*"], val_fraction=0.2, seq_len=16, batch_size=10_000)
    assert len(list(large.train_dataloader())) == 1


def test_order_is_a_function_of_seed_and_epoch(corpus: Path) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        loader = ready(train=[f"{corpus}/*"], val_fraction=0.2, seq_len=16, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        return [batch["input_ids"].tolist() for batch in loader]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_without_shuffling_training_windows_come_in_order(corpus: Path) -> None:
    module = ready(train=[f"{corpus}/*"], val_fraction=0.2, seq_len=16, shuffle=False)
    first = next(iter(module.train_dataloader()))["input_ids"]
    assert first[1:, 0].tolist() == first[:-1, -1].tolist()


def test_tokenizer_batches_count_all_bytes_of_their_text(corpus: Path, tokenizer_path: str) -> None:
    module = ready(train=[f"{corpus}/*"], val_fraction=0.2, seq_len=2, tokenizer=tokenizer_path)
    everything = [document for path in sorted(corpus.iterdir()) for document in read_documents(str(path), "text")]
    held_out = [document for document in everything if is_validation(document, 0.2)]
    counted = sum(int(batch["num_bytes"].sum()) for batch in module.val_dataloader())
    assert counted == sum(map(len, held_out)) + len(held_out)
    assert module.vocab_size == 280


def test_prompts_are_openings_of_validation_documents(corpus: Path) -> None:
    module = ready(train=[f"{corpus}/*.jsonl"], val=[f"{corpus}/*.txt"], seq_len=32)
    (batch,) = module.predict_dataloader()
    assert [module.decode(row) for row in batch["input_ids"]] == [
        (corpus / name).read_bytes()[:15].decode() for name in ("a.txt", "b.txt")
    ]


def test_setup_reads_the_corpus_once(corpus: Path) -> None:
    module = ready(train=[f"{corpus}/*"], val_fraction=0.2)
    for path in corpus.iterdir():
        path.unlink()
    module.setup("validate")
    assert len(module.val_dataloader()) > 0


def test_vocabulary_is_known_before_setup(tokenizer_path: str) -> None:
    assert TextFiles(train=["nowhere"]).vocab_size == 256
    assert TextFiles(train=["nowhere"], tokenizer=tokenizer_path).vocab_size == 280


def test_windows_survive_the_way_to_a_worker(corpus: Path) -> None:
    dataset = ready(train=[f"{corpus}/*"], val_fraction=0.2).dataset("train")
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3]["input_ids"], dataset[3]["input_ids"])


class Bigrams(LightningModule):
    """The smallest model that uses a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(256, 256)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.logits(batch["input_ids"][:, :-1]).flatten(0, 1), batch["labels"][:, 1:].flatten())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["input_ids"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


# Lightning's advice to use more worker processes, and a deprecated torch call of its own.
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
@pytest.mark.parametrize("streaming", [False, True])
def test_lightning_fits_validates_and_predicts(corpus: Path, streaming: bool) -> None:
    module = TextFiles(train=[f"{corpus}/*"], val_fraction=0.2, seq_len=16, streaming=streaming)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet)  # type: ignore[arg-type]
    model = Bigrams()
    trainer.fit(model, module)
    assert trainer.callback_metrics["val_loss"].isfinite()
    (prompts,) = trainer.predict(model, module) or []
    assert prompts.shape == (16, 8)
