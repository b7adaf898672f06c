"""SpikeInjector: each fault does what it says, when it says, once, and nothing of it stays behind."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_processes import launch

from lowbit_lightning.callbacks import SpikeInjector
from lowbit_lightning.callbacks.spike_injector import corrupted
from lowbit_lightning.errors import InvalidArgumentError


class Module(LightningModule):
    """What goes in and what comes out of every training step, gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.inputs: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.inputs.append(batch["values"].clone())
        return {"loss": self.layer(batch["values"]).square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)  # what a fault leads to is not looked at here


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        self.optimizers().step()  # type: ignore[union-attr]
        return loss


class Record(Callback):
    """Appended before the injector on purpose: it must see what the injector did all the same."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[float] = []
        self.weights: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(float(pl_module.layer.weight.detach().norm()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(float(pl_module.layer.weight.grad.norm()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def samples() -> list[dict[str, Tensor]]:
    values = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return [{"values": value} for value in values]


def fit(*callbacks: Callback, module: Module | None = None, steps: int = 6, **options: Any) -> tuple[Module, Record]:
    module, record = module or Module(), Record()
    with torch.no_grad():
        module.layer.weight.copy_(torch.tensor([[0.3, -0.2, 0.5, 0.1]]))
        module.layer.bias.zero_()
    settings: dict[str, Any] = {"enable_checkpointing": False} | options
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[record, *callbacks], **settings,
    )  # fmt: skip
    loader: DataLoader[Any] = DataLoader(samples(), batch_size=4)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, record


@pytest.fixture
def clean() -> tuple[Module, Record]:
    return fit()


def test_nan_grad_comes_in_its_step_only() -> None:
    _, record = fit(SpikeInjector(2))
    assert [gradient != gradient for gradient in record.gradients[:3]] == [False, False, True]


def test_monitors_configured_before_it_see_the_fault() -> None:
    """Overlays append, so a drill comes after the monitor in the list."""
    _, record = fit(SpikeInjector(5))
    assert record.gradients[5] != record.gradients[5]


def test_loss_is_multiplied_with_its_gradient(clean: tuple[Module, Record]) -> None:
    _, record = fit(SpikeInjector(2, "loss"))
    assert record.losses[2] == pytest.approx(1000 * clean[1].losses[2], rel=1e-5)
    assert record.gradients[2] == pytest.approx(1000 * clean[1].gradients[2], rel=1e-4)
    assert record.losses[:2] == clean[1].losses[:2]


def test_batch_is_corrupted_for_the_module_and_whole_in_the_data(clean: tuple[Module, Record]) -> None:
    data = samples()
    before = copy.deepcopy(data)
    module, record = Module(), Record()
    trainer = Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[SpikeInjector(1, "batch"), record],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    assert all(torch.equal(one["values"], other["values"]) for one, other in zip(data, before, strict=True))
    assert torch.equal(module.inputs[1], 1000 * before[1]["values"])
    assert torch.equal(module.inputs[2], before[2]["values"])


def test_corrupted_integers_are_random_and_stay_in_range() -> None:
    tokens = torch.tensor([7] * 30 + [-100] * 8 + [3, 5]).view(4, 10)
    batch = {"ids": tokens, "none": tokens[:0], "mask": torch.ones(4, dtype=torch.bool), "name": "text"}
    broken = corrupted(batch, seed=3)
    assert broken["ids"].shape == (4, 10)
    assert set(broken["ids"].flatten().tolist()) == {7, -100, 3, 5}
    assert (broken["ids"] == 7).sum() < 20
    assert broken["none"].shape == (0, 10)
    assert broken["mask"].all()
    assert broken["name"] == "text"
    assert torch.equal(corrupted(batch, seed=3)["ids"], broken["ids"])


def test_tokens_and_labels_are_drawn_apart() -> None:
    """The same draw for both would leave them fitting together."""
    tokens = torch.arange(40)
    broken = corrupted([tokens, tokens], seed=0)
    assert not torch.equal(*broken)


def test_weights_are_multiplied_before_the_step(clean: tuple[Module, Record]) -> None:
    module, record = fit(SpikeInjector(2, "weights"), steps=3)
    expected = fit(steps=2)[0].layer.weight * 10
    assert record.losses[2] > 10 * clean[1].losses[2]
    assert torch.allclose(module.layer.weight, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["nan_grad", "loss", "batch", "weights", "rank"])
def test_module_is_unchanged_afterwards(kind: Any) -> None:
    module, _ = fit(SpikeInjector([0, 5], kind))
    assert "training_step" not in vars(module)


def test_module_is_unchanged_after_a_crash() -> None:
    class Crash(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("as a fault may make it")

    module = Crash()
    with pytest.raises(ValueError, match="as a fault"):
        fit(SpikeInjector(0, "loss"), module=module)
    assert "training_step" not in vars(module)


def test_a_training_step_that_was_replaced_before_is_given_back() -> None:
    module = Module()
    original = module.training_step
    module.training_step = lambda batch: original(batch, 0)  # type: ignore[method-assign]
    replaced = module.training_step
    _, record = fit(SpikeInjector(1, "loss"), module=module)
    assert module.training_step is replaced
    assert record.losses[1] > 100 * record.losses[0]


def test_with_accumulation_the_first_batch_of_the_step_is_hit() -> None:
    """Steps are counted, not batches; the gradient is broken once all of it is there."""
    _, clean = fit(steps=3, accumulate_grad_batches=2)
    _, loss = fit(SpikeInjector(1, "loss"), steps=3, accumulate_grad_batches=2)
    ratios = [broken / healthy for broken, healthy in zip(loss.losses, clean.losses, strict=True)]
    assert ratios[:4] == pytest.approx([1, 1, 1000, 1], rel=1e-5)
    _, nan = fit(SpikeInjector(1), steps=3, accumulate_grad_batches=2)
    assert [gradient != gradient for gradient in nan.gradients] == [False, True, True]


def test_several_steps_take_one_kind_or_one_each() -> None:
    kinds = [kind for _, kind in SpikeInjector([3, 1], ["loss", "batch"]).faults]
    assert kinds == ["batch", "loss"]
    assert SpikeInjector([3, 1], "weights").faults == [(1, "weights"), (3, "weights")]


def test_manual_optimization_is_broken_too() -> None:
    module, (_, healthy) = Manual(), fit(module=Manual())
    _, record = fit(SpikeInjector([1, 2, 3], ["loss", "batch", "nan_grad"]), module=module)
    assert record.gradients[1] == pytest.approx(1000 * healthy.gradients[1], rel=1e-4)
    assert float(module.inputs[2].abs().max()) > 100
    assert [gradient != gradient for gradient in record.gradients[2:4]] == [False, True]


def test_a_run_without_gradients_is_told_so() -> None:
    module = Module()
    injector = SpikeInjector(0)
    injector._in_gradient = ["nan_grad"]
    module._fabric = None
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="no gradient to break"):
        injector.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters()))


class GoBack(Callback):
    """What a rollback is to the injector: counters return to where they were, with its own state as it is."""

    def __init__(self, at: int, by: int, data: bool) -> None:
        self.at, self.by, self.data = at, by, data

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        if trainer.global_step == self.at:
            self.at = -1
            steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
            steps.total.completed -= self.by
            steps.total.ready -= self.by
            if self.data:
                trainer.fit_loop.epoch_loop.batch_progress.total.ready -= self.by


def injected(record: Record) -> int:
    return sum(loss > 50 for loss in record.losses)


def test_a_replay_does_not_meet_the_fault_again() -> None:
    _, record = fit(SpikeInjector(2, "loss"), GoBack(4, 3, data=True), steps=8)
    assert injected(record) == 1


def test_a_persistent_fault_comes_again_with_its_batch() -> None:
    _, record = fit(SpikeInjector(2, "loss", persistent=True), GoBack(4, 3, data=True), steps=8)
    assert injected(record) == 2


def test_a_persistent_fault_does_not_follow_a_run_that_skips_its_batch() -> None:
    _, record = fit(SpikeInjector(2, "loss", persistent=True), GoBack(4, 3, data=False), steps=8)
    assert injected(record) == 1


def resumes(test: Any) -> Any:
    """Lightning's advice on what is so on purpose: the folder of the earlier run, a loader without a position."""
    for message in ("Checkpoint directory .* exists and is not empty", "You're resuming from a checkpoint that ended"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")


@resumes
def test_resume_does_not_repeat_the_fault(tmp_path: Path) -> None:
    fit(saving(tmp_path), SpikeInjector([2, 4], "loss"), enable_checkpointing=True, steps=3)
    again = saving(tmp_path), SpikeInjector([2, 4], "loss")
    _, record = fit(*again, enable_checkpointing=True, ckpt_path=tmp_path / "step=3.ckpt")
    assert [loss > 50 for loss in record.losses] == [False, True, False]


@resumes
def test_what_lies_before_a_checkpoint_without_its_state_does_not_come(tmp_path: Path) -> None:
    fit(saving(tmp_path), enable_checkpointing=True, steps=3)
    again = saving(tmp_path), SpikeInjector(2, "loss")
    _, record = fit(*again, enable_checkpointing=True, ckpt_path=tmp_path / "step=3.ckpt")
    assert injected(record) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"step": -1}, "step=-1"),
        ({"step": []}, r"step=\[\]"),
        ({"step": 1, "kind": "fire"}, "kind='fire' .* nan_grad, loss, batch, weights, rank"),
        ({"step": [1, 2], "kind": ["loss"]}, "1 faults for 2 steps"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        SpikeInjector(**arguments)


def _two_ranks(rank: int, folder: Path) -> None:
    records = {
        kind: fit(SpikeInjector(1, kind), steps=2, strategy="ddp", devices=2)[1]  # type: ignore[arg-type]
        for kind in ("nan_grad", "loss", "rank")
    }
    torch.save({kind: record.gradients for kind, record in records.items()}, folder / f"{rank}.pt")


def test_rank_breaks_the_last_rank_only_and_the_others_break_all(tmp_path: Path) -> None:
    launch(_two_ranks, tmp_path)
    first, last = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["loss"] == last["loss"]
    assert [gradients[1] != gradients[1] for gradients in (first["nan_grad"], last["nan_grad"])] == [True, True]
    assert [gradients[1] != gradients[1] for gradients in (first["rank"], last["rank"])] == [False, True]
