"""CausalLM: its metrics against torchmetrics and Hugging Face, and the errors a user meets."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.models import CausalLM
from lowbit_lightning.models.language_metrics import LanguageModelMetrics

TINY = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


class Tokens(LightningDataModule):
    """Eight sequences of 12 random tokens, two bytes of text to a token."""

    def __init__(self, vocab_size: int = 32) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def loader(self) -> DataLoader[Any]:
        tokens = torch.randint(1, 32, (8, 12), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": row, "num_bytes": torch.tensor(22)} for row in tokens]
        return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = loader

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader([{"input_ids": torch.arange(1, 6)}])  # type: ignore[arg-type]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


class TrainableLM(CausalLM):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture
def trainer(tmp_path: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip


@pytest.fixture
def model() -> TrainableLM:
    torch.manual_seed(0)
    return TrainableLM(config=TINY, max_new_tokens=4, temperature=0)


def test_validation_metrics_equal_torchmetrics_and_the_definition(trainer: Trainer, model: TrainableLM) -> None:
    logged = trainer.validate(model, Tokens(), verbose=False)[0]
    perplexity = Perplexity()
    with torch.no_grad():
        for batch in Tokens().loader():
            perplexity.update(model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:])
    assert logged["val_perplexity"] == pytest.approx(perplexity.compute().item(), rel=1e-5)
    assert logged["val_loss"] == pytest.approx(math.log(logged["val_perplexity"]), rel=1e-5)
    # 11 predicted tokens of two bytes each.
    assert logged["val_bits_per_byte"] == pytest.approx(logged["val_loss"] / math.log(2) / 2, rel=1e-5)


def test_training_loss_is_hugging_faces(model: TrainableLM) -> None:
    batch = next(iter(Tokens().loader()))
    nll, tokens = model._nll(batch)
    expected = model.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert torch.allclose(nll / tokens, expected)


def test_fit_logs_loss_and_throughput(trainer: Trainer, model: TrainableLM) -> None:
    trainer.fit(model, Tokens())
    assert {"train_loss", "tokens_per_second", "val_loss", "val_bits_per_byte"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["tokens_per_second"] > 0
    assert model.model.training


def test_fit_after_validate_counts_its_own_validation_only(trainer: Trainer, model: TrainableLM) -> None:
    trainer.validate(model, Tokens(), verbose=False)
    trainer.fit(model, Tokens())
    at_the_end = trainer.callback_metrics["val_loss"].item()
    assert trainer.validate(model, Tokens(), verbose=False)[0]["val_loss"] == pytest.approx(at_the_end, rel=1e-6)


def test_throughput_counts_every_batch_of_an_accumulation_window(tmp_path: Any, model: TrainableLM) -> None:
    counted: list[int] = []

    class Counting(TrainableLM):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if name == "tokens_per_second":
                counted.append(self._tokens_seen)
            super().log(name, value, *args, **kwargs)

    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(Counting(config=TINY), Tokens())
    assert counted == [2 * 4 * 12]


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model = CausalLM(config=TINY, gradient_checkpointing=gradient_checkpointing)
        nll, _ = model._nll(next(iter(Tokens().loader())))
        nll.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*grads)


def test_predict_continues_the_prompt_and_decodes(trainer: Trainer, model: TrainableLM, capsys: Any) -> None:
    texts = trainer.predict(model, Tokens())
    assert texts is not None
    (text,) = texts[0]
    assert text.startswith("1 2 3 4 5 ")
    assert len(text.split()) <= 9
    assert text in capsys.readouterr().out


def test_pretrained_weights_come_back_in_fp32_whatever_they_are_saved_in(tmp_path: Any, model: TrainableLM) -> None:
    model.model.bfloat16().save_pretrained(tmp_path)
    model.model.float()
    loaded = CausalLM(pretrained=str(tmp_path))
    for expected, parameter in zip(model.parameters(), loaded.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected)


def test_a_checkpoint_rebuilds_the_module(tmp_path: Any, trainer: Trainer, model: TrainableLM) -> None:
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    loaded = TrainableLM.load_from_checkpoint(tmp_path / "model.ckpt")
    tokens = torch.arange(1, 9).view(1, 8)
    assert torch.equal(loaded(tokens), model(tokens))


def test_labels_that_are_masked_count_for_nothing() -> None:
    metrics = LanguageModelMetrics()
    model = CausalLM(config=TINY)
    batch = next(iter(Tokens().loader()))
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 6:] = -100
    nll, tokens = model._nll(batch)
    metrics.update(nll, tokens)
    assert tokens == 4 * 5
    assert "bits_per_byte" not in metrics.compute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"config": TINY, "pretrained": "x"}, "exactly one"),
        ({"config": {"model_type": "lama"}}, "lama"),
        ({"config": {"model_type": "bert", "num_attention_heads": 5}}, "bert"),
        ({"pretrained": "no/such/folder/here"}, "no/such/folder/here"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        CausalLM(**arguments)


def test_data_with_more_tokens_than_the_model_is_refused(trainer: Trainer, model: TrainableLM) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 40"):
        trainer.fit(model, Tokens(vocab_size=40))
