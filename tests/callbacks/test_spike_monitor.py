"""SpikeMonitor: it measures what it says, sees what is out of line before the step, and remembers it over a resume."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.monitored import QUIET, Net, Witness, fit, on_rank, spiking
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_processes import launch

from lowbit_lightning.callbacks import SpikeMonitor
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.alerts import AlertCommand


def monitor(**settings: Any) -> SpikeMonitor:
    return SpikeMonitor(**QUIET | settings)


def column(witness: Witness, name: str) -> list[float]:
    return [values[name] for values in witness.measured if name in values]


def test_loss_and_norm_are_those_of_the_step() -> None:
    net = Net()
    witness = fit(net, monitor())
    assert column(witness, "spike/loss") == pytest.approx(net.losses)
    assert column(witness, "spike/grad_norm") == pytest.approx(witness.norms)
    assert witness.found == []


def test_loss_is_the_mean_over_accumulated_batches() -> None:
    net = Net()
    witness = fit(net, monitor(), accumulate_grad_batches=4)
    means = [sum(net.losses[start : start + 4]) / 4 for start in range(0, 40, 4)]
    assert column(witness, "spike/loss")[-1] == pytest.approx(means[-1])
    assert len(witness.norms) == 10


def test_last_window_of_an_epoch_may_be_short() -> None:
    net = Net()
    witness = fit(net, monitor(), accumulate_grad_batches=3)  # 40 batches: the last step has one
    assert column(witness, "spike/loss")[-1] == pytest.approx(net.losses[-1])


def test_norm_is_seen_before_clipping() -> None:
    witness = fit(Net(), monitor(), gradient_clip_val=1e-3)
    assert min(column(witness, "spike/grad_norm")) > 0.1


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_bf16_spikes_are_seen(precision: Any) -> None:
    witness = fit(Net(spiking(20)).to(torch.float32), monitor(), precision=precision)
    assert [found[:2] for found in witness.found] == [(20, "spike")]


class Fp16(MixedPrecision):
    """16-mixed on a CPU: a real scaler, and autocast in what a CPU can do."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)


def test_gradient_scale_is_undone() -> None:
    net = Net(spiking(20))
    witness = fit(net, monitor(), plugins=[Fp16()], accumulate_grad_batches=2)
    assert column(witness, "spike/grad_norm")[-1] == pytest.approx(witness.norms[-1])
    assert column(witness, "spike/loss")[-1] == pytest.approx(sum(net.losses[-2:]) / 2)
    assert [found[:2] for found in witness.found] == [(21, "spike")]


class Poison(Callback):
    """Gradients that are not finite at one step, as fp16 makes them when its scale is too large."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.global_step in self.steps:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)


def test_overflow_at_a_high_scale_is_left_to_the_scaler() -> None:
    witness = fit(Net(), monitor(), callbacks=[Poison(2, 9)], plugins=[Fp16()])
    assert witness.found == []
    assert column(witness, "spike/nonfinite")[9] == 4


def test_nonfinite_gradients_are_seen_from_the_first_step() -> None:
    witness = fit(Net(), monitor(), callbacks=[Poison(0)])
    (first, second) = witness.events[:2]
    assert (first.kind, first.signal, first.value) == ("spike", "nonfinite", 4)
    # Nobody left the step out, so the weights are gone.
    assert second.kind == "nonfinite_weights"


def test_event_tells_where_and_which_samples() -> None:
    witness = fit(Net(spiking(31)), monitor(), max_epochs=1, accumulate_grad_batches=2)
    (event,) = [event for event in witness.events if event is not None]
    assert (event.step, event.epoch, event.batch, event.rank) == (15, 0, 31, 0)
    assert event.samples == [60, 61, 62, 63]
    assert event.score > 6
    assert event.value > event.limit
    assert set(event.signals) == {"loss", "grad_norm", "nonfinite", "update_ratio"} - {"update_ratio"}


def test_batch_is_counted_over_the_whole_run() -> None:
    witness = fit(Net(spiking(55)), monitor(), max_epochs=2)
    (event,) = [event for event in witness.events if event is not None]
    assert (event.epoch, event.batch) == (1, 55)


def test_a_step_without_loss_is_not_judged() -> None:
    net = Net(lambda loss, batch, rank: None if batch == 20 else loss)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        witness = fit(net, monitor())
    assert len(witness.events) == 40
    assert witness.found == []


def test_update_ratio_is_measured_on_healthy_steps() -> None:
    witness = fit(Net(), monitor(signals=["update_ratio"]))
    assert 0 < column(witness, "spike/update_ratio")[-1] < 0.1


class Publishing(Net):
    def on_before_backward(self, loss: torch.Tensor) -> None:
        batch = self.trainer.fit_loop.total_batch_idx
        self.log("stash/error", 50.0 if batch == 30 else 0.1 + 0.01 * (batch % 7))


def test_a_published_metric_is_judged_by_name() -> None:
    witness = fit(Publishing(), monitor(signals=["loss", "stash/error"]))
    assert witness.found == [(30, "spike", "stash/error")]


def test_a_signal_that_is_never_logged_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match=r"signals: no metric 'stash/eror'.*stash/error"):
        fit(Publishing(), monitor(signals=["loss", "stash/eror"]))


class Manual(Net):
    """Two optimizers that step by hand, the second one on a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for index, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss = self.loss(batch) * (1 + 9 * index)
            self.manual_backward(loss * 1000 if (batch_idx, index) == (20, 1) else loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.layers[index].parameters(), 1e-8) for index in (0, 2)]


def test_manual_optimizers_have_detectors_of_their_own() -> None:
    witness = fit(Manual(), monitor(min_samples=12))
    assert [found[:2] for found in witness.found] == [(20, "spike")]
    (event,) = [event for event in witness.events if event is not None]
    assert (event.signals["optimizer"], event.step) == (1, 41)
    last = witness.measured[-1]
    assert last["spike/loss_1"] == pytest.approx(10 * last["spike/loss_0"], rel=0.01)


def test_resume_goes_on_without_a_blind_step(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1)
    whole = monitor()
    witness = fit(Net(spiking(21)), whole, callbacks=[keep], enable_checkpointing=True)
    saved = torch.load(next(tmp_path.glob("*step=20.ckpt")), weights_only=True)["callbacks"]["SpikeMonitor"]
    resumed = monitor()

    class Resume(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            resumed.load_state_dict(saved)

    again = fit(Net(spiking(1)), resumed, callbacks=[Resume()])
    assert witness.found[0][0] == 21
    assert again.found[0][0] == 1
    assert json.loads(json.dumps(whole.state_dict())) == whole.state_dict()


def test_a_lasting_nan_is_shown_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    net = Net(lambda loss, batch, rank: loss * math.nan if batch >= 5 else loss)
    made = monitor(patience=10)
    with caplog.at_level("INFO"):
        fit(net, made)
    shown = [record.message for record in caplog.records if record.message.endswith("; seen")]
    assert made.events == 35
    assert len(shown) == 10


def test_validation_metric_that_rises_is_an_event() -> None:
    class Worse(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0 + self.trainer.global_step / 40)

    made = monitor(watch={"val_loss": {"max_rise": "10%", "action": "rollback"}})
    made.guarded = True  # so that events wait for whoever acts
    fit(Worse(), made, limit_val_batches=1, val_check_interval=10)
    first = next(event for event in made.watch_events if event.step == 20)
    assert (first.kind, first.action, first.signal) == ("watch", "rollback", "val_loss")
    assert (first.signals["best"], first.signals["best_step"]) == (1.25, 10)
    for event in made.watch_events:
        made.record(event, "rollback")


def test_training_metric_is_watched_with_patience() -> None:
    made = monitor(watch={"stash/error": {"above": 10}, "spike/events": {"above": 0.5, "action": "raise_precision"}})
    made.guarded = True
    fit(Publishing(), made)
    assert [event.signal for event in made.watch_events if event.signal == "stash/error"] == ["stash/error"]


@pytest.mark.parametrize("key", ["val_los", "train_los"])
def test_a_watched_key_that_is_never_logged_is_an_error(key: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"watch: no metric '{key}' has been logged.*val_loss"):
        fit(Net(), monitor(watch={key: {"above": 1}}), limit_val_batches=1, max_epochs=2)


def test_a_metric_of_a_later_validation_is_waited_for() -> None:
    class Accuracy(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("accuracy", 0.5)

    watch = {"accuracy": {"below": 0.1}}
    fit(Accuracy(), monitor(watch=watch), max_epochs=2, check_val_every_n_epoch=2, limit_val_batches=1)


def test_watched_keys_of_every_stage_are_found() -> None:
    class Epochs(Publishing):
        def on_train_epoch_end(self) -> None:
            self.log("of_epoch", 3.0)

    fit(
        Epochs(),
        monitor(watch={key: {"above": 1e9} for key in ("val_loss", "stash/error", "of_epoch")}),
        limit_val_batches=1,
    )


def test_a_validation_metric_without_a_validation_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="watch: no metric 'val_loss' has been logged"):
        fit(Net(), monitor(watch={"val_loss": {"max_rise": "3%"}}), max_epochs=2)


def test_a_metric_of_training_may_be_called_like_one_of_validation() -> None:
    class Critic(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("value_loss", 1.0)
            return super().training_step(batch, batch_idx)

    fit(Critic(), monitor(watch={"value_loss": {"above": 2}}), limit_val_batches=1, log_every_n_steps=1000)


@pytest.mark.parametrize("settings", [{"watch": {"train_los": {"above": 1}}}, {"signals": ["train_los"]}])
def test_a_run_of_less_than_an_epoch_warns_of_a_name_that_is_never_logged(settings: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"no metric 'train_los' has been logged.*train_loss"):
        fit(Net(), monitor(**settings), max_steps=5)


def test_a_name_that_is_never_logged_is_warned_of_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit_lightning.callbacks.spike_monitor.LOOKS", 3)
    with pytest.warns(UserWarning, match="no metric 'train_los'") as warned:
        fit(Net(), monitor(watch={"train_los": {"above": 1}}), max_steps=10, log_every_n_steps=2)
    assert len([one for one in warned if "train_los'" in str(one.message)]) == 1


def test_an_action_that_nobody_would_take_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match=r"watch\['val_loss'\]\.action=rollback needs a SpikeGuard"):
        fit(Net(), monitor(watch={"val_loss": {"above": 1, "action": "rollback"}}))


def test_a_run_of_another_trainer_begins_without_memory() -> None:
    made = monitor()
    fit(Net(), made)
    assert fit(Net(lambda loss, batch, rank: loss * 1000), made).found == []


def test_command_gets_the_event_and_its_failure_is_told() -> None:
    command = 'printf "%s\\n" "$SPIKE_MESSAGE" >> alerts; printf "%s" "$SPIKE_EVENT" > event.json; exit 3'
    made = monitor(watch={"stash/error": {"above": 10}}, on_alert=command)
    with pytest.warns(UserWarning, match="failed with status 3"):
        fit(Publishing(), made)
    assert "stash/error = 50, limit 10" in Path("alerts").read_text()
    assert json.loads(Path("event.json").read_text())["decision"] == "seen"


def test_training_does_not_wait_for_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    made = monitor(watch={"stash/error": {"above": 10}}, on_alert="sleep 60")
    monkeypatch.setattr(AlertCommand, "finish", lambda self: None)
    fit(Publishing(), made)
    commands = made._recorder.alerts._running
    assert commands
    for command in commands:
        assert command.poll() is None
        os.killpg(command.pid, signal.SIGKILL)
        command.wait()


def accumulated(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_scalars_when_due_and_events_always(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(Net(spiking(33)), monitor(), logger=logger, log_every_n_steps=10)
    board = accumulated(tmp_path)
    assert [point.step for point in board.Scalars("spike/loss")] == [9, 19, 29, 33, 39]
    assert [point.value for point in board.Scalars("spike/events")] == [0, 0, 0, 1, 1]
    for name in ("score", "loss_median", "threshold", "loss_lower", "grad_norm"):
        assert f"spike/{name}" in board.Tags()["scalars"]
    cards = [tag for tag in board.Tags()["tensors"] if tag.endswith("text_summary")]
    assert cards == ["spike/0000_spike_at_33/text_summary"]
    assert [point.step for point in board.Tensors(cards[0])] == [33]


class GoBack(Callback):
    """Rewinds the loggers' axis as a rollback does, from step 35 to step 20, once."""

    def __init__(self, made: SpikeMonitor) -> None:
        self.made = made

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 35:
            self.made.guarded = True
            for event in self.made._recorder.open:
                self.made.record(event, "rollback", "to step 20")
            if self.made.axis == "rewind":
                trainer.fit_loop.epoch_loop._batches_that_stepped = 20

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 36:
            self.made.mark_rollback(35, 20)


@pytest.mark.parametrize(("axis", "steps"), [("rewind", [*range(25)]), ("monotonic", [*range(40)])])
def test_curves_are_clean_after_a_rollback(tmp_path: Path, axis: Any, steps: list[int]) -> None:
    made = monitor(axis=axis)
    fit(
        Net(spiking(35)), made, callbacks=[GoBack(made)], logger=TensorBoardLogger(tmp_path, name="", version=""),
    )  # fmt: skip
    scripts, board = accumulated(tmp_path), plugin_event_accumulator.EventAccumulator(str(tmp_path))
    board.Reload()  # what the scalars page reads with; it differs in what makes it drop steps
    for name in ("spike/loss", "train_loss"):
        for read in (scripts.Scalars, board.Tensors):
            assert [point.step for point in read(name)] == steps
        if axis == "rewind":
            assert max(point.value for point in scripts.Scalars(name)) < 10
    assert [point.value for point in scripts.Scalars("spike/rolled_back_steps")] == [15]
    (card,) = [tag for tag in board.Tags()["tensors"] if "_spike_at_35" in tag]
    assert [point.step for point in board.Tensors(card)] == [20 if axis == "rewind" else 35]
    assert len(board.Tensors("custom_scalars__config__")) == 1


def test_other_loggers_get_the_scalars(tmp_path: Path) -> None:
    fit(Net(spiking(20)), monitor(), logger=CSVLogger(tmp_path, name="", version=""))
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "spike/threshold" in header


def test_two_monitors_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SpikeMonitor`"):
        fit(Net(), monitor(), callbacks=[monitor()])


def test_a_second_monitor_that_is_added_later_is_an_error() -> None:
    class Adds(Callback):
        def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
            trainer.callbacks.append(monitor())

    with pytest.raises(InvalidArgumentError, match="two SpikeMonitors"):
        fit(Net(), monitor(), callbacks=[Adds()])


def test_table_rows_name_signals_and_watched_metrics() -> None:
    rows = monitor(watch={"val_loss": {"above": 1, "action": "rollback"}}).describe_technique()
    assert rows == [
        ("SpikeMonitor", "loss, grad_norm, nonfinite", "above 6 robust deviations of the last 16 healthy steps"),
        ("SpikeMonitor", "val_loss", "watched: rollback"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signals": []}, "signals=.*names"),
        ({"signals": ["loss", "loss"]}, "each once"),
        ({"window": 1}, "window=1"),
        ({"threshold": -1.0}, "threshold=-1"),
        ({"min_samples": 17}, "min_samples=17"),
        ({"divergence_ratio": 0.5}, "divergence_ratio=0.5"),
        ({"patience": 0}, "patience=0"),
        ({"axis": "back"}, "axis='back'"),
        ({"watch": {"val_loss": {"abov": 1}}}, "watch.'val_loss'.*'abov'"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        monitor(**settings)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(on_rank, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_agree_on_what_one_rank_suffers(strategy: str, ranks: list[dict[str, Any]]) -> None:
    one, other = (rank[strategy] for rank in ranks)
    assert one["events"] == other["events"]
    assert one["state"] == other["state"]
    (event,) = one["events"]
    assert (event["kind"], event["batch"], event["rank"]) == ("spike", 12, 1)
    assert event["samples"] == other["samples"][12]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_signals_are_global_over_ranks_and_shards(strategy: str, ranks: list[dict[str, Any]]) -> None:
    one, other = (rank[strategy] for rank in ranks)
    means = [(mine + theirs) / 2 for mine, theirs in zip(one["losses"], other["losses"], strict=True)]
    assert one["loss"] == pytest.approx(means)
    assert one["measured"] == pytest.approx(one["norms"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_reduction_a_step(strategy: str, ranks: list[dict[str, Any]]) -> None:
    assert [rank[strategy]["reductions"] for rank in ranks] == [20, 20]
