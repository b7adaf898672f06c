import itertools
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from spikes.rollback_run import (
    OPTIMIZERS,
    Case,
    Numbers,
    Rollback,
    Stream,
    assert_replay_is_exact,
    assert_same,
    digest,
    map_style,
    plain,
    run,
)

from lowbit_lightning.data import ResumableDataLoader
from lowbit_lightning.spikes.snapshot import TrainingSnapshot

BF16 = {"precision": "bf16-true"}
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_replay_ends_as_a_run_that_never_spiked(optimizer: str) -> None:
    assert_replay_is_exact(Case(optimizer=optimizer))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(spikes=(9, 7, 6)), id="three times to one snapshot"),
        pytest.param(Case(steps=40, to=8, spikes=(15,)), id="across an epoch"),
        pytest.param(Case(steps=40, to=12, spikes=(15,)), id="to an epoch's last batch"),
        pytest.param(Case(steps=40, spikes=(12,)), id="from an epoch's last batch"),
        pytest.param(Case(steps=30, to=8, spikes=(27,)), id="across two epochs"),
        pytest.param(Case(to=0, spikes=(5,)), id="before the first step"),
        pytest.param(Case(to=0, steps=30, spikes=(15,)), id="before the first step, from another epoch"),
        pytest.param(Case(spikes=(13,), options={"accumulate_grad_batches": 2}, steps=9), id="accumulation"),
        pytest.param(
            Case(to=0, spikes=(2,), options={"accumulate_grad_batches": 2}, steps=5), id="accumulation, first"
        ),
        pytest.param(Case(options=BF16), id="bf16"),
        pytest.param(Case(options=BF16, optimizer="SoloAdamW", spikes=(9, 8)), id="bf16 solo"),
        pytest.param(Case(loader=map_style(2), steps=10, spikes=(7,)), id="workers"),
        pytest.param(Case(guard={"where": "disk"}, spikes=(9, 7)), id="disk"),
    ],
)
def test_replay_is_exact(case: Case) -> None:
    assert_replay_is_exact(case)


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "precision", "accumulate", "workers", "shape"),
    list(
        itertools.product(
            sorted(OPTIMIZERS),
            ["32-true", "bf16-true", "bf16-mixed"],
            [1, 2],
            [0, 2],
            ["once", "twice", "epoch", "first"],
        )
    ),
)
def test_replay_matrix(optimizer: str, precision: str, accumulate: int, workers: int, shape: str) -> None:
    to, spikes, steps = {
        "once": (4, (9,), 12),
        "twice": (4, (9, 7), 12),
        "epoch": (5, (8,), 14 * 2),
        "first": (0, (3,), 6),
    }[shape]
    if shape == "epoch":
        to, spikes = 12 // accumulate - 1, (15,)
    elif accumulate == 2:
        spikes = tuple(2 * spike for spike in spikes)
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    if shape == "epoch" and accumulate == 2:
        spikes = (16,)
    assert_replay_is_exact(Case(map_style(workers), optimizer, steps, to, spikes, options=options))


@pytest.mark.parametrize("axis", ["rewind", "monotonic"])
def test_skip_restores_the_state_and_goes_on_with_the_data(axis: Any) -> None:
    case = Case()
    clean, clean_trainer, _ = run(case)
    rollback = Rollback(4, [9], "skip", axis=axis)
    net, trainer, _ = run(case, rollback)
    assert_same(rollback.captured, rollback.restored[0])
    assert trainer.global_step == case.steps
    # The five abandoned batches are gone, so five more are needed for as many steps.
    assert trainer.fit_loop.epoch_loop.total_batch_idx == clean_trainer.fit_loop.epoch_loop.total_batch_idx + 5
    assert net.seen[: len(clean.seen)] == clean.seen
    logged = trainer.fit_loop.epoch_loop._batches_that_stepped
    assert logged == (case.steps if axis == "rewind" else case.steps + 5)


def test_skip_over_an_epochs_end_begins_the_epochs_sums_anew() -> None:
    case = Case(steps=30)
    rollback = Rollback(8, [15], "skip")
    net, _, _ = run(case, rollback)
    assert rollback.done == ["skip"]
    assert all(loss == loss for loss in net.epoch_losses)  # no NaN of the abandoned steps


def test_state_that_did_not_exist_is_deleted() -> None:
    rollback = Rollback(0, [3], "skip")
    _, _, _ = run(Case(steps=5), rollback)
    assert not [key for key in rollback.restored[0] if "exp_avg" in key]


class Averaged(torchmetrics.MeanMetric):
    pass


class NetWithMetric(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.mean = Averaged()
        self.values: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[1]).pow(2).mean()
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.values.append(float(self.trainer.callback_metrics["mean"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> Any:
        return map_style()()


class Remembering(pl.Callback):
    restore_on_rollback = True

    def __init__(self) -> None:
        self.seen = [torch.zeros(())]

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(self.seen[-1] + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def fit(net: pl.LightningModule, *callbacks: pl.Callback, steps: int = 12, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(net)
    return trainer


class FixedSteps(Rollback):
    """A Rollback for modules without a scheduler."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.spikes and trainer.fit_loop.total_batch_idx + 1 == self.spikes[0]:
            self.spikes.pop(0)
            snapshot = self.ring.choose(trainer.global_step, before_step=self.to + 1)
            self.done.append(snapshot.restore(trainer, pl_module, data=self.data, axis=self.axis))
        elif trainer.global_step == self.to:
            self.ring.take(trainer, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        pass


def test_torchmetrics_sums_go_back() -> None:
    torch.manual_seed(0)
    clean = NetWithMetric()
    torch.manual_seed(0)
    net = NetWithMetric()
    fit(clean)
    fit(net, FixedSteps(4, [9], "replay"))
    assert net.values == clean.values


@pytest.mark.parametrize("first", ["callback", "rollback"])
def test_a_callback_that_asks_to_takes_part(first: str) -> None:
    callback, rollback = Remembering(), FixedSteps(4, [9, 8], "replay")
    order = [callback, rollback] if first == "callback" else [rollback, callback]
    fit(NetWithMetric(), *order)
    assert [int(value) for value in callback.seen] == list(range(13))


@pytest.mark.parametrize("first", ["average", "rollback"])
def test_averaged_weights_go_back(first: str) -> None:
    def fitted(rollback: pl.Callback | None) -> Any:
        torch.manual_seed(0)
        net = NetWithMetric()
        average = EMAWeightAveraging(decay=0.5)
        callbacks = [one for one in ([average, rollback] if first == "average" else [rollback, average]) if one]
        fit(net, *callbacks)
        return net.layer.weight.detach().clone()  # at the end, the average's

    assert torch.equal(fitted(None), fitted(FixedSteps(4, [9, 8], "replay")))


def test_a_foreign_optimizers_numbers_and_entries_go_back() -> None:
    class Foreign(torch.optim.SGD):
        total_steps = 0

        def step(self, closure: Any = None) -> Any:
            self.total_steps += 1
            self.state["run"] = {"steps": self.total_steps}  # some keep entries under strings
            return super().step(closure)

    class Module(NetWithMetric):
        def configure_optimizers(self) -> Any:
            return Foreign(self.parameters(), lr=torch.tensor(1e-2), momentum=0.9)

    class Halve(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.optimizers[0].param_groups[0]["lr"].mul_(0.5)

    trainer = fit(Module(), FixedSteps(4, [9, 7], "replay"), Halve())
    optimizer = trainer.optimizers[0]
    assert optimizer.total_steps == 12
    assert optimizer.state["run"] == {"steps": 12}
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2 * 0.5**12)


def test_the_precision_scaler_goes_back() -> None:
    scale = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    class Module(NetWithMetric):
        scales: ClassVar[list[float]] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.scales.append(scale.get_scale())

    plugin = MixedPrecision("16-mixed", "cpu", scale)
    fit(Module(), FixedSteps(4, [9], "replay"), plugins=[plugin])
    assert Module.scales[8] == Module.scales[3]
    assert Module.scales[9:13] == Module.scales[4:8]


def test_manual_optimization_goes_back() -> None:
    class Manual(NetWithMetric):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
            return loss

    torch.manual_seed(0)
    clean = Manual()
    torch.manual_seed(0)
    net = Manual()
    first, second = fit(clean), fit(net, FixedSteps(4, [9, 8], "replay"))
    assert torch.equal(clean.layer.weight, net.layer.weight)
    assert first.global_step == second.global_step


def test_validation_after_the_snapshot_is_repeated_once() -> None:
    class Validated(NetWithMetric):
        def __init__(self) -> None:
            super().__init__()
            self.validations: list[int] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if not self.trainer.sanity_checking and batch_idx == 0:
                self.validations.append(self.trainer.global_step)
            torch.rand(3)

        def val_dataloader(self) -> Any:
            return ResumableDataLoader(Numbers(), 4)

    options = {"val_check_interval": 4, "limit_val_batches": 1}
    torch.manual_seed(0)
    clean = Validated()
    torch.manual_seed(0)
    net = Validated()
    fit(clean, **options)
    fit(net, FixedSteps(4, [10], "replay"), **options)
    assert clean.validations == [4, 8, 12]
    assert net.validations == [4, 8, 4, 8, 12]
    assert torch.equal(clean.layer.weight, net.layer.weight)


@pytest.mark.parametrize("data", ["replay", "skip"])
def test_the_first_snapshot_is_not_followed_by_a_validation(data: Any) -> None:
    """Loggers have no step for one."""

    class Validated(NetWithMetric):
        validations = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            type(self).validations += batch_idx == 0 and not self.trainer.sanity_checking

        def val_dataloader(self) -> Any:
            return ResumableDataLoader(Numbers(), 4)

    class First(FixedSteps):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.ring.take_first(trainer, pl_module)

    fit(Validated(), First(0, [3], data), val_check_interval=4, limit_val_batches=1)
    assert Validated.validations == 3


def test_a_snapshot_shares_no_memory_with_the_run() -> None:
    class Watch(pl.Callback):
        snapshot = TrainingSnapshot()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                pointers = {p.data_ptr() for p in pl_module.parameters()}
                self.snapshot.capture(trainer, pl_module)
                self.snapshot.restore(trainer, pl_module, data="skip", axis="rewind")
                assert {p.data_ptr() for p in pl_module.parameters()} == pointers
                own = {tensor.data_ptr() for tensor in self.snapshot._copy.tensors.values()}
                live = [t for s in trainer.optimizers[0].state.values() for t in s.values() if torch.is_tensor(t)]
                assert not own & {tensor.data_ptr() for tensor in [*pl_module.parameters(), *live]}

    fit(NetWithMetric(), Watch(), steps=4)


def test_a_second_capture_reuses_the_memory() -> None:
    class Watch(pl.Callback):
        snapshot = TrainingSnapshot()
        seen: ClassVar[list[set[int]]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.snapshot.capture(trainer, pl_module)
            weights = [t for name, t in self.snapshot._copy.tensors.items() if name.startswith("weights/")]
            self.seen.append({tensor.data_ptr() for tensor in weights})

    fit(NetWithMetric(), Watch(), steps=3)
    assert Watch.seen[0] == Watch.seen[1] == Watch.seen[2]


def test_an_iterable_loader_that_is_fetched_ahead_is_exact() -> None:
    def loader() -> Any:
        return ResumableDataLoader(Stream(), 4)

    assert_replay_is_exact(Case(loader, spikes=(9, 7)))
    assert_replay_is_exact(Case(loader, steps=30, to=8, spikes=(15,)))
    assert_replay_is_exact(Case(loader, steps=30, to=11, spikes=(15,)))
    assert_replay_is_exact(Case(loader, steps=30, to=12, spikes=(15,)))
    assert_replay_is_exact(Case(loader, to=0, spikes=(4,)))


def test_kept_batches_are_exact_for_any_loader() -> None:
    assert_replay_is_exact(Case(plain(noisy=True), spikes=(9, 7)))
    assert_replay_is_exact(Case(plain(noisy=True), steps=30, to=8, spikes=(15, 14)))
    assert_replay_is_exact(Case(plain(noisy=True), steps=30, to=12, spikes=(27,)))
    assert_replay_is_exact(Case(plain(noisy=True), to=0, spikes=(4,)))
    assert_replay_is_exact(Case(plain(noisy=True, dataset=Stream), steps=30, to=8, spikes=(15,)))


def test_main_process_augmentation_is_exact_with_a_stateful_loader() -> None:
    assert_replay_is_exact(Case(map_style(noisy=True), spikes=(9, 8), steps=30))
    assert_replay_is_exact(Case(map_style(noisy=True), to=0, spikes=(4,)))


def test_digest_sees_every_part() -> None:
    net, trainer, values = run(Case(steps=2))
    assert {"layers.0.weight", "layers.1.running_mean", "steps", "0.exp_avg", "lr", "rng"} <= values.keys()
    assert_same(digest(trainer, net) | {"rng": None}, values | {"rng": None})
