"""A Lightning run without gradients: hooks, logs and checkpoints are those of any run, the module is left in peace."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lowbit_lightning.callbacks import ExactResume
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import FZOO, MeZO
from lowbit_lightning.strategies import ForwardOnlyStrategy

FEATURES, CLASSES, SAMPLES, BATCH = 6, 3, 48, 8
# A resumed run writes where the first one wrote.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

Make = Callable[[nn.Module], torch.optim.Optimizer]


def fzoo(**settings: Any) -> Make:
    return lambda net: FZOO(net.named_parameters(), **({"lr": 3e-2, "num_perturbations": 4} | settings))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1))


class Net(LightningModule):
    """All that a training step may do beside computing a loss."""

    def __init__(self, make: Make = fzoo()) -> None:  # noqa: B008
        super().__init__()
        self.make = make
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.outputs: list[Tensor] = []
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert not torch.is_grad_enabled()
        inputs, targets = batch
        self.seen += len(inputs)
        self.calls += 1
        scores = self.head(self.body(inputs)).float()
        loss = cross_entropy(scores, targets)
        self.outputs.append(loss)
        self.accuracy(scores, targets)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy}, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return self.make(self)

    def train_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=BATCH, shuffle=True)


class Validated(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.head(self.body(batch[0])).float(), batch[1]))


class Record(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.losses: list[float] = []
        self.weights: list[Tensor] = []

    def on_before_zero_grad(self, *args: Any) -> None:
        self.events.append("zero_grad")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.events.append("before_backward")
        self.losses.append(float(loss))

    def on_after_backward(self, *args: Any) -> None:
        self.events.append("after_backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.events.append("optimizer_step")
        assert all(parameter.grad is None for parameter in pl_module.parameters())
        self.weights.append(flat(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.events.append("batch_end")
        assert float(outputs["loss"]) == pytest.approx(self.losses[-1])
        self.weights.append(flat(pl_module))


def flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).clone()


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "strategy": ForwardOnlyStrategy(), "accelerator": "cpu", "max_steps": 4, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "log_every_n_steps": 1, "callbacks": list(callbacks),
    }  # fmt: skip
    return Trainer(**(defaults | options))


@pytest.mark.parametrize(
    "make",
    [
        fzoo(),
        fzoo(baseline="mean"),
        fzoo(perturbation="rank1"),
        lambda net: MeZO(net.named_parameters(), lr=3e-2),
    ],
    ids=["clean", "mean", "rank1", "mezo"],
)
def test_loss_falls_and_validation_runs(make: Make) -> None:
    net, record = Validated(make), Record()
    run = trainer(record, max_steps=150, max_epochs=-1)
    run.fit(net, val_dataloaders=DataLoader(data(), batch_size=SAMPLES))
    assert sum(record.losses[-6:]) < 0.8 * sum(record.losses[:6])
    assert float(run.callback_metrics["val_loss"]) < 1.0


def test_everything_is_counted_and_logged_once() -> None:
    net, record = Net(), Record()
    run = trainer(record, max_steps=SAMPLES // BATCH)
    run.fit(net)
    steps = SAMPLES // BATCH
    assert len(net.outputs) == net.calls == steps
    assert [float(loss) for loss in net.outputs] == record.losses
    assert int(net.seen) == SAMPLES
    assert int(net.body[1].num_batches_tracked) == steps
    assert float(run.callback_metrics["train_loss_epoch"]) == pytest.approx(sum(record.losses) / steps)
    assert net.accuracy.update_count in (0, steps)  # reset at the epoch's end
    one_step = ["zero_grad", "before_backward", "after_backward", "optimizer_step", "batch_end"]
    assert record.events == one_step * steps


def test_batch_statistics_are_those_of_the_clean_passes() -> None:
    """As a run would leave them that makes no other pass: lr 0 keeps its weights the same."""
    net, plain = Net(fzoo(lr=0.0)), Net(fzoo(lr=0.0))
    plain.load_state_dict(net.state_dict())
    torch.manual_seed(0)
    batches: list[Any] = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch)

    trainer(Keep()).fit(net)
    with torch.no_grad():
        for inputs, _ in batches:
            plain.body(inputs)
    assert torch.equal(net.body[1].running_var, plain.body[1].running_var)


def test_weights_move_in_the_update_only() -> None:
    net, record = Net(), Record()
    trainer(record).fit(net)
    before_updates, after_updates = record.weights[0::2], record.weights[1::2]
    assert all(not torch.equal(*pair) for pair in zip(before_updates, after_updates, strict=True))
    assert all(torch.equal(*pair) for pair in zip(after_updates, before_updates[1:], strict=False))


def test_dropout_masks_agree_and_go_on_from_step_to_step() -> None:
    masks: list[list[Tensor]] = []

    class Masks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(masks) <= batch_idx:
                masks.append([])
            masks[batch_idx].append(torch.rand(4))
            return super().training_step(batch, batch_idx)

    trainer(max_steps=3).fit(Masks())
    assert [len(step) for step in masks] == [5, 5, 5]
    assert all(torch.equal(mask, step[0]) for step in masks for mask in step)
    assert not torch.equal(masks[0][0], masks[1][0])


def test_accumulated_micro_batches_make_the_step_of_one_batch() -> None:
    class Plain(Net):
        def train_dataloader(self) -> Any:
            return DataLoader(data(), batch_size=self.batch_size)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return cross_entropy(self.head(batch[0]), batch[1])

    def build() -> Plain:
        torch.manual_seed(1)
        net = Plain(fzoo(eps=1e-2))
        net.head = nn.Linear(FEATURES, CLASSES)
        return net

    whole, parts, record = build(), build(), Record()
    whole.batch_size, parts.batch_size = 16, 4
    trainer(max_steps=3).fit(whole)
    trainer(record, max_steps=3, accumulate_grad_batches=4).fit(parts)
    assert torch.allclose(flat(whole), flat(parts), atol=1e-4)
    assert record.events.count("optimizer_step") == 3
    assert record.events.count("batch_end") == 12


@pytest.mark.parametrize("save_at", [4, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_bit_exact(save_at: int, accumulate: int, tmp_path: Path) -> None:
    def fit(net: Net, **options: Any) -> Trainer:
        callbacks = [ModelCheckpoint(tmp_path, every_n_train_steps=save_at, save_top_k=-1), ExactResume()]
        run = trainer(*callbacks, max_steps=9, enable_checkpointing=True, accumulate_grad_batches=accumulate)
        run.fit(net, **options)
        return run

    make = fzoo(reuse_losses=True, perturbation="rank1", weight_decay=0.01)
    straight, resumed = Net(make), Net(make)
    fit(straight)
    run = fit(resumed, ckpt_path=next(tmp_path.glob(f"*step={save_at}.ckpt")))
    assert run.global_step == 9
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_schedulers_are_honoured() -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    record = Record()
    trainer(record).fit(Scheduled())
    moved = [not torch.equal(*pair) for pair in zip(record.weights[0::2], record.weights[1::2], strict=True)]
    assert moved == [True, True, False, False]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
def test_precisions_train(precision: Any) -> None:
    class NoNorm(Net):  # BatchNorm1d has no fp16 on CPUs
        def __init__(self) -> None:
            super().__init__(fzoo())
            self.body[1] = nn.Identity()

    net, record = NoNorm(), Record()
    trainer(record, precision=precision, max_steps=100, max_epochs=-1).fit(net)
    assert sum(record.losses[-6:]) < 0.8 * sum(record.losses[:6])


def test_only_adapters_move_on_a_quantized_frozen_base() -> None:
    class Base(nn.Module):
        """int8 weights and their scale, as a quantized checkpoint has them; as buffers and as a frozen parameter."""

        def __init__(self) -> None:
            super().__init__()
            weight = torch.randn(16, FEATURES)
            self.scale = nn.Parameter(weight.abs().amax() / 127, requires_grad=False)
            self.codes = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
            self.down, self.up = nn.Linear(FEATURES, 2, bias=False), nn.Linear(2, 16, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, inputs: Tensor) -> Tensor:
            return linear(inputs, self.codes.float() * self.scale) + self.up(self.down(inputs))

    class Adapted(Net):
        def __init__(self) -> None:
            super().__init__(fzoo())
            self.body = nn.Sequential(Base(), nn.GELU())

    net = Adapted()
    base = {name: value.clone() for name, value in net.named_parameters() if not value.requires_grad}
    record = Record()
    trainer(record, max_steps=150, max_epochs=-1).fit(net)
    assert all(torch.equal(dict(net.named_parameters())[name], value) for name, value in base.items())
    assert sum(record.losses[-6:]) < 0.8 * sum(record.losses[:6])


def test_a_guard_can_skip_an_update() -> None:
    class Guard(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 1:
                optimizer.skip_next_update()

    record = Record()
    run = trainer(record, Guard())
    run.fit(Net())
    moved = [not torch.equal(*pair) for pair in zip(record.weights[0::2], record.weights[1::2], strict=True)]
    assert moved == [True, False, True, True]
    assert run.global_step == 4


@pytest.mark.parametrize("where", ["clean", "perturbed"])
def test_a_nonfinite_loss_makes_no_update_and_is_published(where: str) -> None:
    passes: list[int] = []

    class Overflows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            passes.append(batch_idx)
            loss = super().training_step(batch, batch_idx)["loss"]
            hit = batch_idx == 1 and passes.count(1) == (1 if where == "clean" else 3)
            return loss * math.inf if hit else loss

    net, record = Overflows(), Record()
    run = trainer(record)
    run.fit(net)
    moved = [not torch.equal(*pair) for pair in zip(record.weights[0::2], record.weights[1::2], strict=True)]
    assert moved == [True, False, True, True]
    assert run.optimizers[0].param_groups[0]["nonfinite_skips"] == 1
    assert float(run.callback_metrics["fzoo/skipped_updates"]) == 1
    assert math.isfinite(record.losses[1]) == (where == "perturbed")


def test_what_it_is_doing_is_logged_and_described() -> None:
    run = trainer(strategy="forward_only")
    run.fit(Net())
    assert float(run.callback_metrics["fzoo/gradient_norm"]) > 0
    assert "forward passes a step" in run.optimizers[0].describe_technique()[0][2]


def test_the_gradient_norm_is_estimated() -> None:
    slope = torch.randn(FEATURES)

    class Slope(Net):
        def __init__(self) -> None:
            super().__init__(fzoo(num_perturbations=64, lr=0.0))
            self.weight = nn.Parameter(torch.zeros(FEATURES))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.dot(self.weight, slope)

    run = trainer(max_steps=1)
    run.fit(Slope())
    assert float(run.callback_metrics["fzoo/gradient_norm"]) == pytest.approx(float(slope.norm()), rel=0.35)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says it once in a process
def test_a_step_that_returns_none_is_skipped() -> None:
    class Sometimes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    record = Record()
    trainer(max_steps=3).fit(net := Sometimes())
    assert net.calls == 2
    assert record.losses == []


def test_a_batch_may_be_emptied_but_not_written() -> None:
    class Pops(Net):
        def train_dataloader(self) -> Any:
            return DataLoader([{"inputs": x, "targets": y} for x, y in data()], batch_size=BATCH)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch.pop("inputs"), batch.pop("targets")), batch_idx)

    class Writes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].mul_(2)
            return super().training_step(batch, batch_idx)

    trainer().fit(Pops())
    with pytest.raises(
        InvalidArgumentError, match=r"training_step writes into its batch \(a tensor of shape \(8, 6\)\)"
    ):
        trainer().fit(Writes())


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Vector(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.body(batch[0])).sum(1)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Iterates(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Net, {"gradient_clip_val": 1.0}, r"gradient_clip_val=1\.0 with ForwardOnlyStrategy: there is no gradient"),
        (Manual, {}, "Manual has automatic_optimization=False"),
        (lambda: Net(lambda net: torch.optim.SGD(net.parameters())), {}, "the optimizer is SGD, which needs gradients"),
        (Vector, {}, r"the loss has shape \(8,\): forward-only training needs a tensor of one element"),
        (Frozen, {}, "every parameter of the optimizer is frozen"),
        (Iterates, {}, r"Iterates\.training_step takes dataloader_iter"),
    ],
    ids=["clipping", "manual", "first-order", "vector", "frozen", "iterator"],
)
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_what_cannot_work_is_refused(module: Callable[[], Net], options: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        trainer(**options).fit(module())


def test_a_gradient_scaler_is_refused() -> None:
    run = trainer()
    run.strategy.precision_plugin.scaler = object()  # what 16-mixed has; on a CPU Lightning takes bf16-mixed instead
    with pytest.raises(InvalidArgumentError, match="precision=16-mixed with ForwardOnlyStrategy"):
        run.fit(Net())


def test_several_devices_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="devices=2 with ForwardOnlyStrategy: one device"):
        trainer(devices=2)


def test_fzoo_without_the_strategy_is_refused_before_anything_moves() -> None:
    class Differentiates(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return cross_entropy(self.head(self.body(batch[0])), batch[1])

    net = Differentiates()
    before = flat(net)
    with pytest.raises(InvalidArgumentError, match=r"FZOO takes none: with a Trainer set strategy to lowbit_lightning"):
        trainer(strategy="auto").fit(net)
    assert torch.equal(flat(net), before)


def test_a_16_bit_loss_is_warned_of() -> None:
    class Coarse(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"].bfloat16()

    with pytest.warns(UserWarning, match=r"training_step returns a torch\.bfloat16 loss"):
        trainer(max_steps=2).fit(Coarse())


def test_validate_needs_no_optimizer() -> None:
    net = Validated(lambda net: torch.optim.SGD(net.parameters()))
    assert trainer(gradient_clip_val=1.0).validate(net, DataLoader(data(), batch_size=BATCH), verbose=False)
