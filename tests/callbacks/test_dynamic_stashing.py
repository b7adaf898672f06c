"""DynamicStashing in a run: exact forward, bytes that are logged, errors at the start, nothing left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import DynamicStashing, MemoryLedger
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.models import CausalLM
from lowbit_lightning.optim import FZOO
from lowbit_lightning.run_summary import summary

CONFIG = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 2, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


class Text(CausalLM):
    def __init__(self, gradient_checkpointing: bool = False) -> None:
        super().__init__(CONFIG, gradient_checkpointing=gradient_checkpointing)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class ByHand(Text):
    """Optimizes by itself, twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


def batches() -> Any:
    ids = torch.randint(0, 256, (16, 48), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)  # type: ignore[arg-type]


def fit(*callbacks: Callback, module: LightningModule | None = None, **options: Any) -> tuple[Trainer, list[float]]:
    losses = Losses()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    options = quiet | {"max_steps": 4, "log_every_n_steps": 2, "accelerator": "cpu", "limit_val_batches": 0} | options
    trainer = Trainer(callbacks=[*callbacks, losses], **options)
    torch.manual_seed(1)
    module = module or Text()
    trainer.fit(module, batches(), batches() if isinstance(module, Text) else None)
    return trainer, losses.seen


def test_the_first_loss_is_that_of_a_plain_run_and_training_stays_close() -> None:
    (_, plain), (_, packed) = fit(max_steps=12), fit(DynamicStashing(4), max_steps=12)
    assert packed[0] == pytest.approx(plain[0], rel=1e-6)
    assert packed == pytest.approx(plain, rel=0.02)
    assert packed != plain


def test_bytes_are_logged_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer, _ = fit(DynamicStashing(4), logger=logger)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    raw, packed = metrics["stash/raw_mb"], metrics["stash/packed_mb"]
    assert raw / packed > 10
    for name, total in (("raw", raw), ("packed", packed)):
        parts = [value for key, value in metrics.items() if key.startswith(f"stash/{name}_mb_")]
        assert sum(parts) == pytest.approx(total)
        assert {"stash/raw_mb_linear", "stash/raw_mb_attention", "stash/raw_mb_norm"} <= metrics.keys()
    assert 0 < metrics["stash/peak_mb"] <= packed
    assert 0.05 < metrics["stash/error"] < 0.2
    told = f"{packed:.2f} MB for backward instead of {raw:.2f} MB"
    assert f"DynamicStashing: the first batch keeps {told}" in caplog.text
    assert f"stash       {told}" in summary(trainer, trainer.lightning_module, 1.0)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("stash/packed_mb")] == [1, 3]
    assert events.Scalars("stash/packed_mb")[-1].value == pytest.approx(packed)


def test_the_ledger_says_what_is_packed_and_how(capsys: pytest.CaptureFixture[str]) -> None:
    fit(MemoryLedger(), DynamicStashing(4, by_kind={"attention": 8}), max_steps=1)
    table = capsys.readouterr().out
    assert "15 linear, 2 attention, 2 activation, 5 norm" in table
    assert "4 bits (attention 8, norm 8, loss 8, other 8), bfp, boxes of 16, stochastic rounding" in table


@pytest.mark.parametrize("options", [
    {"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 2},
    {"module": ByHand}, {"module": lambda: Text(gradient_checkpointing=True)},
], ids=["bf16-mixed", "bf16-true", "accumulated", "by hand", "checkpointed"])  # fmt: skip
def test_works_with(options: dict[str, Any]) -> None:
    make: Callable[[], LightningModule] = options.pop("module", Text)
    (_, plain), (trainer, packed) = (fit(*made, module=make(), **options) for made in ((), (DynamicStashing(4),)))
    # In bf16 steps of 1/256 are all there is.
    assert packed == pytest.approx(plain, rel=0.02)
    assert float(trainer.callback_metrics["stash/packed_mb"]) < float(trainer.callback_metrics["stash/raw_mb"]) / 2.5


def test_a_budget_is_kept_to_with_the_bits_that_it_allows(caplog: pytest.LogCaptureFixture) -> None:
    metrics = fit(DynamicStashing(2))[0].callback_metrics
    least, most = (float(metrics[f"stash/{name}_mb"]) for name in ("packed", "raw"))
    budget = 1.4 * least
    stashing = DynamicStashing(budget_mb=budget)
    trainer, _ = fit(stashing)
    packed = float(trainer.callback_metrics["stash/packed_mb"])
    assert 0.9 * budget < packed <= budget < most
    bits = stashing.precision.by_kind
    assert 2 < bits["linear"] <= 8
    assert f"budget_mb={budget} gives" in caplog.text
    resumed = DynamicStashing(budget_mb=budget)
    resumed.load_state_dict(stashing.state_dict())
    assert resumed.precision.by_kind == bits
    with pytest.raises(InvalidArgumentError, match=r"keeps .* MB at the fewest bits"):
        fit(DynamicStashing(budget_mb=0.9 * least))


@pytest.mark.parametrize("arguments", [{"stash_only": 4}, {"preset": "paper"}, {"by_kind": {"norm": 8}}])
def test_a_budget_goes_without_bits(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"budget_mb=1\.0 .* leave out stash_only"):
        DynamicStashing(budget_mb=1.0, **arguments)


def test_every_batch_of_a_step_has_noise_of_its_own() -> None:
    class Steps(Callback):
        def __init__(self, stashing: DynamicStashing) -> None:
            self.stashing, self.seen = stashing, [0][:0]

        def on_train_batch_end(self, *_: Any) -> None:
            assert self.stashing.stash is not None
            self.seen.append(self.stashing.stash.step)

    stashing = DynamicStashing(4)
    steps = Steps(stashing)
    fit(stashing, steps, accumulate_grad_batches=2, max_steps=2)
    assert steps.seen == [0, 1, 2, 3]


class Fails(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("on purpose")


def test_modules_and_trainer_are_as_before_after_a_run_and_after_one_that_failed() -> None:
    for extra in ((), (Fails(),)):
        module, stashing = Text(), DynamicStashing(4)
        before = {name: set(vars(part)) for name, part in module.named_modules() if name}
        if extra:
            with pytest.raises(RuntimeError, match="on purpose"):
                fit(stashing, *extra, module=module)
        else:
            trainer, _ = fit(stashing, module=module)
            assert "train_step_context" not in vars(trainer.precision_plugin)
        assert {name: set(vars(part)) for name, part in module.named_modules() if name} == before
        assert stashing.stash is None


def bare_trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def test_flat_parameters_are_refused() -> None:
    trainer = bare_trainer()
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(InvalidArgumentError, match=r"FSDPStrategy is not supported .* ModelParallelStrategy"):
        DynamicStashing(4).on_fit_start(trainer, Text())


def test_an_optimizer_without_a_backward_pass_is_refused() -> None:
    trainer = bare_trainer()
    trainer.strategy._optimizers = [FZOO(Text().parameters())]
    with pytest.raises(InvalidArgumentError, match="FZOO, which has no backward pass"):
        DynamicStashing(4).on_fit_start(trainer, Text())


def test_compiled_modules_are_refused() -> None:
    module = Text()
    module.model.model.layers[0].compile(backend="eager")
    with pytest.raises(InvalidArgumentError, match=r"model\.model\.layers\.0 is compiled by torch\.compile"):
        fit(DynamicStashing(4), module=module)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"include": ["Conv3d"]}, "include: 'Conv3d' is neither a kind of tensor"),
    ({"include": ["convolution"]}, "leave nothing to pack in Text"),
    ({"exclude": ["nothing*"]}, r"exclude: 'nothing\*' is neither"),
])  # fmt: skip
def test_what_matches_nothing_is_refused_at_the_start(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        fit(DynamicStashing(4, **arguments))


@pytest.mark.parametrize("arguments", [
    {"stash_only": 9}, {"format": "int"}, {"box": 8}, {"rounding": "down"}, {"by_kind": {"norms": 4}},
])  # fmt: skip
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"out of range"):
        DynamicStashing(**arguments)


def test_a_module_with_nothing_but_functions_is_packed_by_hooks() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            hidden = (self.weight[batch["input_ids"] % 64] @ self.weight).tanh()
            return (hidden @ self.weight).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer, _ = fit(DynamicStashing(4), module=Plain())
    assert float(trainer.callback_metrics["stash/raw_mb"]) > 3 * float(trainer.callback_metrics["stash/packed_mb"])
