"""SpikeGuard: a run in trouble ends with the same bits as one that never met it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from callbacks.guarded_run import (
    EPOCH,
    SNAPSHOT,
    BadBatches,
    LeaveOut,
    Net,
    Watcher,
    decisions,
    entries,
    fit,
    guard,
    long_epoch,
    monitor,
    on_two_ranks,
    state,
)
from contract.small_run import differences
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from two_processes import launch

import lowbit_lightning.__main__ as command
from lowbit_lightning.callbacks import ExactResume, SpikeGuard, SpikeInjector, SpikeMonitor
from lowbit_lightning.errors import InvalidArgumentError, TrainingDivergedError
from lowbit_lightning.optim import SoloAdamW


def solo(named: Any) -> torch.optim.Optimizer:
    return SoloAdamW(named, lr=0.05, min_numel=0)


def fused(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for _, param in named], lr=0.05, fused=True)


def momentum_sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([param for _, param in named], lr=1e-4, momentum=0.9, weight_decay=0.1)


#: What a user may have set, each as a function that gives a fresh run: (module, callbacks, trainer's options).
SETTINGS: dict[str, Callable[[], tuple[Net, list[pl.Callback], dict[str, Any]]]] = {
    "plain": lambda: (Net(), [], {}),
    "solo": lambda: (Net(solo), [], {}),
    "sgd": lambda: (Net(momentum_sgd), [], {}),
    "accumulation": lambda: (Net(), [], {"accumulate_grad_batches": 2}),
    "clipping": lambda: (Net(), [], {"gradient_clip_val": 0.1}),
    "bf16-mixed": lambda: (Net(), [], {"precision": "bf16-mixed"}),
    "bf16-true": lambda: (Net(), [], {"precision": "bf16-true"}),
    "16-mixed": lambda: (Net(), [], {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1.0))}),
    "16-mixed-fused": lambda: (
        Net(fused),
        [],
        {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1.0))},
    ),
    "ema": lambda: (Net(), [EMAWeightAveraging(decay=0.9)], {}),
}


def run(setting: str, *callbacks: pl.Callback, **options: Any) -> dict[str, Any]:
    net, own, settings = SETTINGS[setting]()
    trainer = fit(*own, *callbacks, net=net, **settings | options)
    return state(trainer) | {"scaler": trainer.precision_plugin.state_dict()}


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "16-mixed-fused"])
def test_skipped_step_leaves_no_trace(setting: str) -> None:
    guarded = run(setting, monitor(), guard("skip"), BadBatches(5, 21, 23))
    assert list(differences(guarded, run(setting, LeaveOut(5, 21, 23)))) == []
    assert decisions() == [(5, "skip"), (21, "skip"), (23, "skip")]


def test_scaler_bears_a_skipped_step_of_a_fused_optimizer() -> None:
    """Which it does not of a step that its author left out, so there is nothing to compare with."""
    net, _, options = SETTINGS["16-mixed-fused"]()
    trainer = fit(monitor(), guard("skip"), BadBatches(5), net=net, max_epochs=1, **options)
    assert decisions() == [(5, "skip")]
    assert {int(states["step"]) for states in trainer.optimizers[0].state.values()} == {EPOCH - 1}


@pytest.mark.parametrize("setting", SETTINGS)
def test_replay_ends_as_if_nothing_had_been(setting: str) -> None:
    """Twice: across the end of an epoch, and later in another."""
    guarded = run(setting, monitor(), guard("rollback", data="replay"), BadBatches(17, 39))
    assert list(differences(guarded, run(setting))) == []
    assert decisions() == [(17, "rollback"), (17, "not reproducible"), (39, "rollback"), (39, "not reproducible")]


@pytest.mark.parametrize("setting", SETTINGS)
def test_rollback_leaves_out_the_data_of_the_abandoned_steps(setting: str) -> None:
    guarded = run(setting, monitor(), guard("rollback"), BadBatches(27), data=long_epoch(), max_epochs=1)
    first, last = entries()[0]["left_out"]
    assert (first, last) == ((20 if setting != "accumulation" else 16), 27)
    clean = run(setting, data=long_epoch(without=range(first, last + 1)), max_epochs=1)
    assert list(differences(guarded, clean)) == []


def left_out() -> set[int]:
    return {batch for entry in entries() for batch in range(entry["left_out"][0], entry["left_out"][1] + 1)}


@pytest.mark.parametrize(
    ("bad", "options", "expected"),
    [
        ([2], {}, {*range(3)}),  # the state before the first step
        ([13], {"skip_ahead": 5}, {*range(8, 19)}),
        ([13, 14, 22], {}, {*range(8, 23)}),  # several bad stretches are several rollbacks
    ],
    ids=["first", "skip_ahead", "several"],
)
def test_rollbacks_leave_out_their_stretches(bad: list[int], options: dict[str, Any], expected: set[int]) -> None:
    guarded = fit(monitor(), guard("rollback", **options), BadBatches(*bad), data=long_epoch(), max_epochs=1)
    assert [decision for _, decision in decisions()] == ["rollback"] * len(bad)
    assert left_out() == expected
    clean = fit(data=long_epoch(without=expected), max_epochs=1)
    assert list(differences(state(guarded), state(clean))) == []


def test_trouble_climbs_the_default_ladder() -> None:
    fit(monitor(patience=6), SpikeGuard(snapshot=SNAPSHOT), BadBatches(*range(12, 18)), Precise())
    rungs = ["skip"] * 3 + ["reset_momentum", "lower_lr", "raise_precision"]
    # Six in a row are a divergence for this monitor, and every rung but rollback has been used up.
    assert decisions() == list(zip(range(12, 18), rungs, strict=True))


class Precise(pl.Callback):
    """A technique with two levels of precision."""

    def __init__(self, top: int = 1) -> None:
        self.level, self.top = 0, top
        self.calls: list[str] = []

    def raise_precision(self) -> bool:
        self.calls.append("raise")
        self.level += self.level < self.top
        return len(self.calls) <= self.top

    def restore_precision(self) -> None:
        self.calls.append("restore")


def test_raised_precision_returns_after_a_healthy_stretch() -> None:
    precise = Precise()
    fit(monitor(), guard("raise_precision"), BadBatches(12), precise)
    assert precise.calls == ["raise", "restore"]
    assert entries()[0]["detail"] == "one level up: Precise"


class PrecisePlugin(Precision):
    """The same as a precision plugin, whose level is in its state."""

    def __init__(self) -> None:
        self.level = 0
        self.levels: list[int] = []

    def raise_precision(self) -> bool:
        self.level += 1
        return True

    def restore_precision(self) -> None:
        self.level = 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self.levels.append(self.level)
        return super().optimizer_step(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.level = state_dict["level"]


def test_precision_plugin_is_raised_and_restored_too() -> None:
    plugin = PrecisePlugin()
    trainer = fit(monitor(), guard("raise_precision"), BadBatches(12), plugins=[plugin])
    assert entries()[0]["detail"] == "one level up: PrecisePlugin"
    stretch = plugin.levels.count(1)
    assert plugin.levels == [0] * 13 + [1] * stretch + [0] * (trainer.global_step - 13 - stretch)
    assert 0 < stretch < trainer.global_step - 13


def test_rollback_brings_back_the_precision_of_the_snapshot() -> None:
    plugin = PrecisePlugin()
    fit(monitor(), guard("raise_precision", "rollback", data="replay"), BadBatches(12, 13), plugins=[plugin])
    assert decisions()[:2] == [(12, "raise_precision"), (13, "rollback")]
    assert plugin.levels[12:15] == [0, 1, 0]


def test_rung_that_is_not_possible_is_passed_over() -> None:
    sgd = Net(lambda named: torch.optim.SGD([param for _, param in named], lr=0.01))
    fit(monitor(), guard("reset_momentum", "raise_precision", "lower_lr"), BadBatches(12), Precise(top=0), net=sgd)
    assert decisions() == [(12, "lower_lr")]


def test_momentum_is_forgotten_and_the_step_left_out() -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 13:
                states = trainer.optimizers[0].state.values()
                self.total = sum(float(value.abs().sum()) for one in states for value in one.values())
                self.weights = trainer.lightning_module.layers[0].weight.clone()

    looks = Look(), Look()
    fit(monitor(), guard("reset_momentum"), BadBatches(12), looks[0])
    fit(LeaveOut(12), looks[1])
    assert looks[0].total == 0
    assert torch.equal(looks[0].weights, looks[1].weights)


def test_lowered_rate_recovers_and_does_not_compound_with_the_scheduler() -> None:
    usual, lowered = Watcher(), Watcher()
    clean = fit(usual)
    guarded = fit(monitor(), guard("lower_lr", lr_scale=0.25, lr_recover_steps=3), BadBatches(12), lowered)
    factors = [rate / full for rate, full in zip(lowered.rates, usual.rates, strict=True)]
    assert factors == pytest.approx([1.0] * 13 + [0.5, 0.75] + [1.0] * 33)
    assert guarded.optimizers[0].param_groups[0]["lr"] == clean.optimizers[0].param_groups[0]["lr"]


def test_rollback_gives_back_the_full_learning_rate() -> None:
    usual, lowered = Watcher(), Watcher()
    fit(usual)
    fit(monitor(), guard("lower_lr", "rollback", data="replay", lr_recover_steps=1000), BadBatches(12, 13), lowered)
    assert decisions()[:2] == [(12, "lower_lr"), (13, "rollback")]
    assert lowered.rates[-10:] == usual.rates[-10:]


def test_trouble_that_comes_again_in_its_replay_is_reproducible_and_climbs() -> None:
    fit(monitor(), guard("rollback", "lower_lr", data="replay"), BadBatches(13, always=True))
    assert decisions() == [(13, "rollback"), (13, "lower_lr")]
    assert entries()[1]["detail"].startswith("again in the replay, so it is reproducible: data or state; learning rate")


def test_optimizer_without_gradients_is_asked_to_leave_the_step_out() -> None:
    class Forward(torch.optim.SGD):
        asked = 0

        def skip_next_update(self) -> None:
            self.asked += 1

    trainer = fit(
        monitor(),
        guard("skip"),
        BadBatches(5, 7),
        net=Net(lambda named: Forward([param for _, param in named], lr=1e-4)),
        max_epochs=1,
    )
    assert cast(Forward, trainer.optimizers[0]).asked == 2


def test_rollback_leaves_the_checkpoints_of_a_run_without_trouble(tmp_path: Path) -> None:
    for name, callbacks in (("guarded", (monitor(), guard("rollback", data="replay"), BadBatches(17))), ("clean", ())):
        fit(*callbacks, ModelCheckpoint(tmp_path / name, every_n_train_steps=3, save_top_k=-1))
    guarded, clean = ({path.name: path for path in (tmp_path / name).glob("*.ckpt")} for name in ("guarded", "clean"))
    assert guarded.keys() - clean.keys() == {"last-trusted.ckpt"}
    for name, path in clean.items():
        saved, expected = (torch.load(one)["state_dict"] for one in (guarded[name], path))
        assert list(differences(saved, expected)) == []


def test_weights_that_are_no_numbers_are_rolled_back() -> None:
    class Poison(SpikeInjector):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.fit_loop.total_batch_idx == 13 and not entries_so_far():
                with torch.no_grad():
                    pl_module.layers[0].weight.fill_(torch.nan)

    guarded = fit(monitor(), guard("skip", "reset_momentum", "rollback", data="replay"), Poison(step=10**9))
    assert decisions()[-2][1] == "rollback"
    assert list(differences(state(guarded), state(fit()))) == []


def entries_so_far() -> list[Any]:
    return entries() if Path("spikes.jsonl").exists() and Path("spikes.jsonl").read_text() else []


class TestAbort:
    def test_error_names_checkpoint_ledger_and_what_was_tried(self, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1)
        with pytest.raises(TrainingDivergedError) as caught:
            fit(monitor(), guard("skip", "rollback", max_skips=2, max_rollbacks=1), BadBatches(*range(20, 40)), saver)
        error = caught.value
        assert error.tried == [
            "skip at step 20",
            "skip at step 21",
            "rollback at step 22",
            "skip at step 16",
            "skip at step 17",
        ]
        assert error.checkpoint == str(tmp_path / "saved/last-trusted.ckpt")
        assert error.ledger == str(tmp_path / "spikes.jsonl")
        assert all(part in str(error) for part in (*error.tried, error.checkpoint, error.ledger, "batch 25"))
        assert decisions()[-1] == (25, "abort")

    def test_weights_that_diverged_are_not_saved_on_the_way_out(self, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path / "saved", save_on_exception=True)
        with pytest.raises(TrainingDivergedError, match="There is no trusted checkpoint yet"):
            fit(monitor(), guard("abort"), BadBatches(5), saver)
        assert not list(tmp_path.glob("saved/*"))

    def test_lowered_rate_is_put_back(self) -> None:
        net = Net()
        with pytest.raises(TrainingDivergedError):
            fit(monitor(), guard("lower_lr"), BadBatches(5, 6), net=net)
        optimizer, scheduler = net.trainer.optimizers[0], net.trainer.lr_scheduler_configs[0].scheduler
        assert [optimizer.param_groups[0]["lr"]] == scheduler.get_last_lr()

    def test_command_exits_with_status_3(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def diverge(arguments: list[str]) -> int:
            raise TrainingDivergedError("spike at step 5", ["skip at step 5"], "last-trusted.ckpt", "spikes.jsonl")

        monkeypatch.setattr(command, "_dispatch", diverge)
        assert command.main(["fit"]) == 3
        message = capsys.readouterr().err
        assert message.startswith("error: training diverged: spike at step 5. Tried: skip at step 5.")
        assert "--ckpt_path trusted" in message

    def test_error_survives_the_way_from_another_process(self) -> None:
        import pickle

        error = TrainingDivergedError("spike", ["skip"], None, "spikes.jsonl")
        copied = pickle.loads(pickle.dumps(error))
        assert (str(copied), copied.tried, copied.ledger) == (str(error), ["skip"], "spikes.jsonl")


class Stabilizer(pl.Callback):
    """Averages gradient norms, which a spike must not enter."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [param.grad for param in pl_module.parameters() if param.grad is not None]
        self.seen.append(all(bool(gradient.isfinite().all()) for gradient in gradients))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (3, 0, 4, 2, 1)])
def test_any_order_in_the_configuration_is_put_right(order: tuple[int, ...]) -> None:
    stabilizer = Stabilizer()
    given = [stabilizer, monitor(), guard("skip"), BadBatches(5), ModelCheckpoint()]
    trainer = fit(*(given[i] for i in order), max_epochs=1)
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds == [BadBatches, SpikeMonitor, SpikeGuard, Stabilizer, ModelCheckpoint]
    assert stabilizer.seen == [True] * EPOCH
    assert decisions() == [(5, "skip")]


def test_guard_alone_makes_its_monitor() -> None:
    trainer = fit(guard("skip"), BadBatches(5), max_epochs=1)
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds == [BadBatches, SpikeMonitor, SpikeGuard]
    assert decisions() == [(5, "skip")]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("ladder", ["jump"]),
        ("max_skips", 0),
        ("max_rollbacks", 0),
        ("data", "again"),
        ("skip_ahead", -1),
        ("lr_scale", 1.0),
        ("lr_recover_steps", 0),
        ("replay_mb", 0),
        ("snapshot", {"every": 100}),
    ],
)
def test_argument_out_of_range_is_named(argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=argument):
        SpikeGuard(**{argument: value})


def test_skip_ahead_makes_no_sense_in_a_replay() -> None:
    with pytest.raises(InvalidArgumentError, match="skip_ahead=3"):
        SpikeGuard(skip_ahead=3, data="replay")


def test_unwritable_ledger_is_refused_before_training() -> None:
    Path("file").touch()
    net = Net()
    with pytest.raises(InvalidArgumentError, match=r"ledger='.*file/spikes.jsonl' cannot be written"):
        fit(guard("skip", ledger="file/spikes.jsonl"), net=net)
    assert net.batches == []


def test_snapshots_larger_than_memory_are_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit_lightning.spikes.snapshot_ring.free_memory_bytes", lambda: 1000)
    net = Net()
    with pytest.raises(InvalidArgumentError, match="snapshots do not fit into memory"):
        fit(monitor(), guard("rollback"), net=net)
    fit(monitor(), guard("skip"), net=net, max_steps=1)  # takes none
    assert len(net.batches) == 1


def test_young_snapshots_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"snapshot\.min_age=6 is below the 20 steps \(patience\)"):
        fit(guard("rollback"), max_steps=1)


def test_start_table_says_what_may_be_done_and_what_it_takes() -> None:
    watching = guard("skip", "rollback")
    fit(monitor(), watching, max_steps=1)
    ((name, rungs, detail),) = watching.describe_technique()
    weights = 4 * sum(tensor.numel() for tensor in Net().parameters()) * 3  # fp32, with two moments
    buffers = 4 * (64 + 64) + 8
    assert (name, rungs) == ("SpikeGuard", "skip, rollback")
    assert detail == f"3 snapshots on cpu, {3 * (weights + buffers) / 1e6:.3f} MB, one every 4 steps"


def test_every_action_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(monitor(), guard("skip", "rollback", max_skips=1), BadBatches(12, 13), max_epochs=1)
    told = [record.message for record in caplog.records if "spike at step" in record.message]
    assert [message.partition("; ")[2].partition(":")[0] for message in told] == ["skip", "rollback"]


class Validated(Net):
    """Logs a metric that gets worse at will."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", self.scores[0])

    def on_validation_end(self) -> None:
        del self.scores[0]

    def val_dataloader(self) -> Any:
        return [torch.zeros(1)]


def watched(scores: list[float], action: str, *callbacks: pl.Callback) -> pl.Trainer:
    watching = monitor(watch={"val_score": {"max_rise": 0.5, "action": action}})
    return fit(
        watching,
        *callbacks,
        net=Validated(scores),
        data=long_epoch(),
        max_epochs=1,
        val_check_interval=8,
        num_sanity_val_steps=0,
    )


def test_watched_metric_brings_back_the_state_of_its_best_value() -> None:
    trainer = watched(
        [3.0, 2.0, 2.1, 9.0, 2.0, 2.0, 2.0, 2.0], "rollback", guard("rollback", snapshot=SNAPSHOT | {"keep": 9})
    )
    (entry,) = entries()
    assert (entry["signal"], entry["decision"], entry["left_out"]) == ("val_score", "rollback", [16, 32])
    clean = fit(data=long_epoch(without=range(16, 33)), max_epochs=1)
    assert list(differences(state(trainer)["module"], state(clean)["module"])) == []


def test_watched_metric_raises_precision_or_only_alerts() -> None:
    precise = Precise()
    watched([2.0, 9.0, 2.0, 2.0, 2.0, 2.0], "raise_precision", guard("skip"), precise)
    assert precise.calls[0] == "raise"
    assert entries()[0]["detail"] == "one level up: Precise"
    watched([2.0, 9.0, 2.0, 2.0, 2.0, 2.0], "alert", guard("skip"))
    assert decisions()[1:] == [(15, "alert")]


def test_rollback_for_a_metric_that_comes_too_late_is_told() -> None:
    watched([2.0, 2.0, 2.0, 2.0, 2.0, 9.0], "rollback", guard("rollback"))
    assert decisions() == [(47, "too late")]


def test_rollback_for_a_metric_without_snapshots_is_refused_at_the_start() -> None:
    with pytest.raises(InvalidArgumentError, match=r"watch\['val_score'\]\.action=rollback, but ladder=\['skip'\]"):
        watched([2.0], "rollback", guard("skip"))


def test_validating_alone_is_left_alone() -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[guard("skip")],
    )
    trainer.validate(Validated([2.0]), verbose=False)
    assert not Path("spikes.jsonl").exists()


class Fails(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 20:
            raise RuntimeError("of the user's own")


def test_no_run_goes_back_to_a_snapshot_of_another() -> None:
    watching, guarding = monitor(), guard("rollback", data="replay")
    with pytest.raises(RuntimeError, match="of the user's own"):
        fit(watching, guarding, Fails())
    assert list(differences(state(fit(watching, guarding, BadBatches(3))), state(fit()))) == []


def test_no_run_pays_for_the_troubles_of_another() -> None:
    guarding = guard("rollback", max_rollbacks=1)
    for _ in range(2):
        fit(monitor(), guarding, BadBatches(3), max_epochs=1)
    assert decisions() == 2 * [(3, "rollback")]


def test_who_divides_by_the_logging_interval_may_do_so_after_a_rollback() -> None:
    class Divides(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                logged.append(self.trainer.fit_loop.total_batch_idx)

    logged: list[int] = []
    fit(monitor(), guard("rollback"), BadBatches(3), net=Divides(), max_epochs=1, log_every_n_steps=4)
    assert logged == [7, 11, 15]


def test_early_stopping_does_not_count_abandoned_validations() -> None:
    counts = []
    for bad in ((), (13,)):
        stopping = EarlyStopping("val_score", patience=99)
        fit(
            monitor(),
            guard("rollback", data="replay"),
            BadBatches(*bad),
            stopping,
            net=Validated([3.0] * 20),
            max_epochs=2,
            val_check_interval=4,
        )
        counts.append(stopping.wait_count)
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_spike_within_the_accumulation_that_was_resumed_is_left_out(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 10:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    fit(monitor(), guard("rollback"), Save(), accumulate_grad_batches=4, max_epochs=1)
    fit(monitor(), guard("rollback"), BadBatches(11), accumulate_grad_batches=4, ckpt_path=tmp_path / "within.ckpt")
    assert decisions() == [(11, "skip")]


def test_relative_ledger_of_a_remote_run_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"ledger='spikes.jsonl' is relative to default_root_dir='memory:"):
        fit(guard("skip"), default_root_dir="memory://run")


class Killed(Exception):
    pass


class KillAt(pl.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise Killed


#: A resumed run has fewer callbacks here, and finds the checkpoints of the first.
resumes = pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:Checkpoint directory")


@resumes
@pytest.mark.parametrize("rung", ["skip", "rollback"])
def test_resumed_run_leaves_out_the_same_batches(rung: str, tmp_path: Path) -> None:
    """The fault does not come again, as hardware faults do not; the ledger alone tells of it."""
    straight = fit(monitor(), guard(rung), BadBatches(13))
    Path("spikes.jsonl").unlink()
    with pytest.raises(Killed):
        fit(monitor(), guard(rung), BadBatches(13), ExactResume(), saver(tmp_path), KillAt(20))
    resumed = fit(monitor(), guard(rung), ExactResume(), ckpt_path=tmp_path / "saved/epoch=0-step=8.ckpt")
    assert list(differences(state(resumed), state(straight))) == []
    assert decisions() == [(13, rung)]


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", every_n_train_steps=4, save_top_k=-1)


def test_new_run_in_the_same_folder_does_not_read_the_ledger_of_the_last() -> None:
    fit(monitor(), guard("skip"), BadBatches(5), max_epochs=1)
    assert list(differences(state(fit(monitor(), guard("skip"), max_epochs=1)), state(fit(max_epochs=1)))) == []


@resumes
def test_budgets_and_lowered_rate_survive_a_resume(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=8, save_top_k=-1)
    whole, part = Watcher(), Watcher()
    ladder = ("lower_lr", "rollback")
    fit(monitor(), guard(*ladder, max_rollbacks=1), BadBatches(5), whole, saver)
    resumed = guard(*ladder, max_rollbacks=1)
    fit(monitor(), resumed, part, ckpt_path=tmp_path / "saved/epoch=0-step=8.ckpt")
    assert part.rates == whole.rates[8:]
    with pytest.raises(TrainingDivergedError):
        fit(
            monitor(),
            guard(*ladder, max_rollbacks=1),
            BadBatches(9, 10, 11),
            ckpt_path=tmp_path / "saved/epoch=0-step=8.ckpt",
        )
    assert [decision for _, decision in decisions()][-3:] == ["rollback", "lower_lr", "abort"]


class Manual(Net):
    """Two optimizers, one for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.layers[i].parameters(), lr=0.05) for i in (0, 3)]


class TestManualOptimization:
    def test_skip_is_refused_where_it_is_asked_for(self) -> None:
        with pytest.raises(InvalidArgumentError, match=r"holds skip, but Manual optimizes manually"):
            fit(monitor(), guard("skip", "rollback"), net=Manual())

    def test_skip_is_left_out_of_the_default_ladder(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            fit(monitor(), SpikeGuard(snapshot=SNAPSHOT), BadBatches(5), net=Manual(), max_epochs=1)
        assert "leaves skip out of its ladder: Manual optimizes manually" in caplog.text
        assert decisions()[-1] == (5, "rollback")

    def test_rollback_ends_as_if_nothing_had_been(self) -> None:
        guarded = fit(monitor(), guard("rollback", data="replay"), BadBatches(21), net=Manual())
        assert list(differences(state(guarded), state(fit(net=Manual())))) == []
        # The second optimizer has met the weights that the first one broke.
        assert [entry["detail"].partition(" ")[0] for entry in entries()] == ["on", "to", "batch"]


CASES = ("ddp-skip", "ddp-replay", "fsdp2-skip", "fsdp2-replay")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch serves all cases: starting two processes takes longer than their training."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(on_two_ranks, folder, CASES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_spike_on_one_rank_leaves_no_trace_on_either(case: str, two_ranks: Path) -> None:
    one, other = (torch.load(two_ranks / f"{case}.{rank}.pt", weights_only=False) for rank in range(2))
    for results in (one, other):
        assert list(differences(results["guarded"], results["clean"])) == []
    for part in ("module", "states"):
        # The running statistics of batch norm are each rank's own.
        assert [d for d in differences(one["guarded"][part], other["guarded"][part]) if "running" not in d] == []
    answers = {"skip": [(11, "skip")], "replay": [(11, "rollback"), (11, "not reproducible")]}
    assert decisions(two_ranks / case / "guarded") == answers[case.partition("-")[2]]
    assert {entry["rank"] for entry in entries(two_ranks / case / "guarded")} == {1}
