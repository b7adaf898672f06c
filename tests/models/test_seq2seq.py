"""Seq2Seq: its loss against Hugging Face, padding that changes nothing, what it writes, and the errors a user meets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lowbit_lightning.data.pairs import TokenizedPairs, padded_pairs
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.models import Seq2Seq

T5 = {
    "model_type": "t5", "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "model_type": "bart", "vocab_size": 32, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip


class Pairs(LightningDataModule):
    """The target is the source backwards, with an end token behind both."""

    vocab_size = 32

    def loader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        rows = []
        for length in torch.randint(2, 6, (24,), generator=generator).tolist():
            source = torch.randint(2, 32, (length,), generator=generator, dtype=torch.int32)
            end = torch.ones(1, dtype=torch.int32)
            rows.append((torch.cat([source, end]).numpy(), torch.cat([source.flip(0), end]).numpy(), length))
        return DataLoader(TokenizedPairs(rows), batch_size=8, collate_fn=lambda batch: padded_pairs(batch, pad=0))

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    def decode(self, tokens: Any) -> str:
        ids = [int(token) for token in tokens]
        return " ".join(map(str, ids[: ids.index(1)] if 1 in ids else ids))


class Trained(Seq2Seq):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(accelerator="cpu", log_every_n_steps=1, **quiet | {"max_epochs": 1} | options)


@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_the_loss_is_hugging_faces(config: dict[str, Any]) -> None:
    model = Trained(config=config)
    batch = next(iter(Pairs().loader()))
    nll, tokens = model.eval()._nll(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert torch.allclose(nll / tokens, model.model(**inputs).loss, atol=1e-5)


def test_padding_changes_no_logit() -> None:
    model = Seq2Seq(config=T5).eval()
    batch = next(iter(Pairs().loader()))
    together = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    for row in range(3):
        source, target = int(batch["attention_mask"][row].sum()), int((batch["labels"][row] >= 0).sum())
        alone = (batch[name][row : row + 1, :source] for name in ("input_ids", "attention_mask"))
        logits = model(*alone, batch["labels"][row : row + 1, :target])
        assert torch.allclose(logits[0], together[row, :target], atol=1e-5)


def test_it_trains_validates_and_tests() -> None:
    model, run = Trained(config=T5, max_new_tokens=6), trainer(max_epochs=12)
    (before,) = trainer().validate(model, Pairs(), verbose=False)
    run.fit(model, Pairs())
    after = {name: float(value) for name, value in run.callback_metrics.items()}
    assert after["val_loss"] < 0.9 * before["val_loss"]
    assert after["val_perplexity"] == pytest.approx(torch.tensor(after["val_loss"]).exp().item(), rel=1e-5)
    (tested,) = run.test(model, Pairs(), verbose=False)
    assert tested["test_loss"] == pytest.approx(after["val_loss"], rel=1e-5)
    assert 0 <= tested["test_bleu"] <= 1


def test_bleu_is_one_where_every_text_is_written_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def perfect(self: Seq2Seq, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["labels"].clamp_min(1)

    monkeypatch.setattr(Seq2Seq, "_generate", perfect)
    (tested,) = trainer().test(Seq2Seq(config=T5), Pairs(), verbose=False)
    assert tested["test_bleu"] == pytest.approx(1.0)


def test_predict_writes_texts_or_tokens_without_the_start() -> None:
    model, data = Seq2Seq(config=T5, max_new_tokens=5, num_beams=2), Pairs()
    written = trainer().predict(model, data)
    assert all(isinstance(text, str) for batch in written or [] for text in batch)
    (tokens, *_) = trainer().predict(model, dataloaders=data.loader()) or []
    assert isinstance(tokens, torch.Tensor)
    assert tokens.shape[0] == 8
    assert 1 <= tokens.shape[1] <= 5


def test_a_checkpoint_loads_without_the_data(tmp_path: Path) -> None:
    model, run = Trained(config=T5), trainer()
    run.fit(model, Pairs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Trained.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of them"),
        ({"config": {"model_type": "llama"}}, "makes no AutoModelForSeq2SeqLM"),
        ({"config": T5, "num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"config": T5, "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ],
)
def test_arguments_that_make_no_model_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Seq2Seq(**arguments)


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    data = Pairs()
    data.vocab_size = 33
    with pytest.raises(InvalidArgumentError, match=r"set model\.init_args\.config\.vocab_size to at least 33"):
        trainer().fit(Trained(config=T5), data)
