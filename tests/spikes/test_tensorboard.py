"""What TensorBoard shows: charts in their place, a card for every event, and no abandoned step."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lowbit_lightning.spikes import tensorboard
from lowbit_lightning.spikes.events import SpikeEvent

EVENT = SpikeEvent("spike", 7, 0, 7, "loss", 9.0, 20.0, 3.0, 0, {"loss": 9.0}, [4, 5])


@pytest.fixture
def logger(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="", version="", prefix="")


def shown(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.flush()
    accumulator = EventAccumulator(logger.log_dir)
    accumulator.Reload()
    return accumulator


def steps(logger: TensorBoardLogger, tag: str) -> list[int]:
    return [point.step for point in shown(logger).Scalars(tag)]


def test_abandoned_steps_are_dropped_and_used_again(logger: TensorBoardLogger) -> None:
    for step in range(10):
        tensorboard.log_scalars([logger], {"loss": 1.0}, step)
    assert tensorboard.purge_after(logger, 5)
    assert steps(logger, "loss") == [0, 1, 2, 3, 4]
    for step in range(5, 8):
        tensorboard.log_scalars([logger], {"loss": 2.0}, step)
    assert [(point.step, point.value) for point in shown(logger).Scalars("loss")][4:] == [
        (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0),
    ]  # fmt: skip


def test_a_logger_that_cannot_purge_says_so(tmp_path: Path) -> None:
    assert not tensorboard.purge_after(CSVLogger(tmp_path), 5)


@pytest.mark.parametrize("prefix", ["", "run"])
def test_layout_shows_the_loss_inside_its_band(tmp_path: Path, prefix: str) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="", prefix=prefix)
    tensorboard.add_layout([logger, CSVLogger(tmp_path)], ["loss", "stash/error"])
    (config,) = shown(logger).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(config.tensor_proto.string_val[0])
    (series,) = layout.category[0].chart[0].margin.series
    start = "run-" if prefix else ""
    assert (series.value, series.lower, series.upper) == tuple(
        f"{start}spike/{name}" for name in ("loss", "loss_lower", "threshold")
    )
    assert list(layout.category[0].chart[-1].multiline.tag) == [f"{start}stash/error"]


def test_card_says_what_where_which_samples_and_what_was_done() -> None:
    text = tensorboard.card(EVENT, "skip", "1 of 3|in a row")
    for part in ("loss = 9", "| done | skip: 1 of 3\\|in a row |", "batch 7", "4, 5", "loss 9"):
        assert part in text


def test_every_logger_that_can_shows_the_card(logger: TensorBoardLogger, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Wandb:  # as WandbLogger.log_text takes it
        def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
            calls.append((key, columns, data, step))

    tensorboard.add_card([logger, CSVLogger(tmp_path), Wandb()], "spike/0", "text", 7)  # type: ignore[list-item]
    assert shown(logger).Tags()["tensors"] == ["spike/0/text_summary"]
    assert calls == [("spike/0", ["text"], [["text"]], 7)]
