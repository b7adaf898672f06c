from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from spikes.rollback_run import BATCH, Case, Numbers, Rollback, Stream, assert_replay_is_exact, map_style, plain, run
from torch.utils.data import DataLoader, DistributedSampler

from lowbit_lightning.callbacks import ExactResume
from lowbit_lightning.data import ResumableDataLoader
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.data_position import skip_batches

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class EagerLoader(DataLoader[Any]):
    """Somebody's stateful loader: ``iter`` draws its base seed from the global generator at once."""

    def __init__(self, workers: int = 0) -> None:
        data = Numbers()
        order = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True)
        super().__init__(data, BATCH, sampler=order, num_workers=workers)
        self.taken, self.to_skip = 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.to_skip = state_dict["taken"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches, skip = super().__iter__(), self.to_skip
        self.taken = self.to_skip = 0
        for _ in range(skip):
            next(batches)
            self.taken += 1
        return self.counted(batches)

    def counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.taken += 1
            yield batch


class LateLoader(EagerLoader):
    """The same, but ``__iter__`` is a generator: its seed is drawn with the first batch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


@pytest.mark.parametrize("loader", [EagerLoader, LateLoader])
@pytest.mark.parametrize(
    "shape", [{"spikes": (9, 7)}, {"steps": 30, "to": 8, "spikes": (15,)}, {"steps": 30, "to": 12, "spikes": (15,)}]
)
def test_any_stateful_loader_replays_exactly(loader: Any, shape: dict[str, Any]) -> None:
    assert_replay_is_exact(Case(loader, **shape))


def test_exact_resume_and_replay_go_together() -> None:
    assert_replay_is_exact(Case(map_style(), spikes=(9, 7), callbacks=(ExactResume,)))
    assert_replay_is_exact(Case(lambda: ResumableDataLoader(Stream(), 4), spikes=(9, 7), callbacks=(ExactResume,)))
    assert_replay_is_exact(Case(plain(), steps=30, to=8, spikes=(15,), callbacks=(ExactResume,)))


def test_several_loaders_replay_exactly() -> None:
    class Pair(Case):
        pass

    def loaders() -> Any:
        return CombinedLoader([map_style()(), map_style()()], "min_size")

    class First(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            step = pl_module.training_step
            pl_module.training_step = lambda batch, batch_idx: step(batch[0], batch_idx)

    assert_replay_is_exact(Pair(loaders, spikes=(9, 7), callbacks=(First,)))
    assert_replay_is_exact(Pair(loaders, steps=30, to=8, spikes=(15,), callbacks=(First,)))


def test_kept_batches_replay_with_workers() -> None:
    assert_replay_is_exact(Case(plain(workers=2), steps=10, spikes=(7,)))


def test_kept_batches_survive_being_changed_in_place() -> None:
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
            batch[1].zero_()

    assert_replay_is_exact(Case(plain(), spikes=(9, 8), callbacks=(Spoil,)))


def test_only_what_snapshots_need_is_kept() -> None:
    kept: list[int] = []

    class Count(Rollback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.ring.keep = 3
            self.ring.take(trainer, pl_module)
            kept.append(len(trainer.fit_loop._data_fetcher._kept))

    run(Case(plain(), steps=12), Count(99, [], "replay"))
    assert max(kept) <= 3


def test_batches_beyond_the_bound_are_a_warning_and_the_rollback_skips() -> None:
    rollback = Rollback(4, [9], "replay", replay_mb=0.12)  # two batches and their generators
    with pytest.warns(UserWarning, match=r"replay_mb=0.12 does not hold the batches"):
        run(Case(plain()), rollback)
    assert rollback.done == ["skip"]


def test_replay_without_preparing_is_an_error() -> None:
    class Unprepared(Rollback):
        def on_train_start(self, *args: Any) -> None:
            pass

    with pytest.raises(RuntimeError, match="prepare_replay"):
        run(Case(), Unprepared(4, [9], "replay"))


def test_reloading_loaders_cannot_be_replayed() -> None:
    with pytest.raises(InvalidArgumentError, match="reload_dataloaders_every_n_epochs=1"):
        run(Case(options={"reload_dataloaders_every_n_epochs": 1}), Rollback(4, [9], "replay"))


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_takes_the_iterator_cannot_be_replayed() -> None:
    class Iterating(pl.LightningModule):
        def training_step(self, dataloader_iter: Any) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

        def train_dataloader(self) -> Any:
            return map_style()()

    callbacks = [Rollback(4, [], "replay")]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_model_summary=False, max_steps=2, callbacks=callbacks)
    with pytest.raises(InvalidArgumentError, match="dataloader_iter"):
        trainer.fit(Iterating())


def test_replay_across_two_ranks_is_decided_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rollback = Rollback(4, [9], "replay")
    decided: list[tuple[bool, bool]] = []

    class Other(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def decide(decision: bool, all: bool = True) -> bool:
                decided.append((decision, all))
                return False  # the other rank no longer has its batches

            monkeypatch.setattr(trainer.strategy, "reduce_boolean_decision", decide)

    run(Case(callbacks=(Other,)), rollback)
    assert decided == [(True, True)]
    assert rollback.done == ["skip"]


# Leaving batches out


class Skip(pl.Callback):
    def __init__(self, after: int, count: int) -> None:
        self.after, self.count = after, count
        self.dropped: list[int] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            self.dropped.append(skip_batches(trainer, self.count))


@pytest.mark.parametrize("stream", [False, True])
def test_dropped_batches_are_not_trained_on(stream: bool) -> None:
    loader = (lambda: ResumableDataLoader(Stream(), 4)) if stream else map_style()
    clean, _, _ = run(Case(loader, steps=20))
    skip = Skip(5, 3)
    net, trainer, _ = run(Case(loader, steps=17, callbacks=(lambda: skip,)))
    assert skip.dropped == [3]
    assert net.seen == clean.seen[:5] + clean.seen[8:20]
    assert trainer.fit_loop.total_batch_idx == 19
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    assert progress.ready == progress.started == progress.processed == progress.completed == 8


@pytest.mark.parametrize("stream", [False, True])
def test_dropping_stops_at_the_epochs_end(stream: bool) -> None:
    loader = (lambda: ResumableDataLoader(Stream(), 4)) if stream else map_style()
    clean, _, _ = run(Case(loader, steps=24))
    skip = Skip(9, 100)
    net, trainer, _ = run(Case(loader, steps=21, callbacks=(lambda: skip,)))
    assert skip.dropped == [3]
    assert net.seen == clean.seen[:9] + clean.seen[12:24]
    assert trainer.fit_loop.total_batch_idx == 23
    assert len(net.epoch_losses) == 2


def test_windows_of_accumulation_stay_whole() -> None:
    options = {"accumulate_grad_batches": 2}
    clean, _, _ = run(Case(steps=6, options=options))
    skip = Skip(4, 1)
    net, trainer, _ = run(Case(steps=5, options=options, callbacks=(lambda: skip,)))
    assert skip.dropped == [2]
    assert net.seen == clean.seen[:4] + clean.seen[6:12]
    assert trainer.global_step == 5


def test_a_limit_of_batches_ends_the_dropping() -> None:
    skip = Skip(5, 100)
    net, trainer, _ = run(Case(steps=10, options={"limit_train_batches": 7}, callbacks=(lambda: skip,)))
    assert skip.dropped == [2]
    assert trainer.current_epoch == 2
    assert len(net.seen) == 10


def test_skip_ahead_after_a_rollback() -> None:
    clean, _, _ = run(Case(steps=24))
    rollback = Rollback(4, [9], "skip", skip_ahead=2)
    net, trainer, _ = run(Case(steps=16), rollback)
    assert rollback.dropped == [2]
    assert net.seen == clean.seen[:9] + clean.seen[11:23]
    assert trainer.global_step == 16


def test_an_epochs_scheduler_steps_where_its_last_batch_is_dropped() -> None:
    rates: list[float] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
            trainer.lr_scheduler_configs[0].interval = "epoch"
            rates.append(trainer.lr_scheduler_configs[0].scheduler.last_epoch)

    run(Case(steps=15, callbacks=(Watch, lambda: Skip(5, 100))))
    assert rates == [0, 1]
