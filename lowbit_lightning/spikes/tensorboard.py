"""How spikes look in a logger: scalars everywhere, and in TensorBoard charts, cards and curves without abandoned steps.

TensorBoard keeps every point it was ever given, so after a rollback a curve would show both the steps that were
abandoned and those that took their place. A ``SessionLog(START)`` event, which TensorBoard's own writers leave after a
restart, makes it drop what was written at that step and later.
"""

from collections.abc import Iterable, Mapping

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lowbit_lightning.spikes.events import SpikeEvent
from lowbit_lightning.spikes.judge import MEASURED


def add_layout(loggers: Iterable[Logger], signals: Iterable[str]) -> None:
    """Group the scalars on TensorBoard's custom scalars page, with the loss inside its band as a margin chart."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            charts = {
                "loss in its band": ["Margin", _tags(logger, "loss", "loss_lower", "threshold")],
                "gradient norm and its limit": ["Multiline", _tags(logger, "grad_norm", "grad_norm_threshold")],
                "score": ["Multiline", _tags(logger, "score")],
                "events": ["Multiline", _tags(logger, "events", "rollbacks", "nonfinite")],
                "update / weight": ["Multiline", _tags(logger, "update_ratio")],
            }
            if published := [name for name in signals if name not in MEASURED]:
                charts["published by techniques"] = ["Multiline", [_prefixed(logger, name) for name in published]]
            logger.experiment.add_custom_scalars({"spikes": charts})


def log_scalars(loggers: Iterable[Logger], scalars: Mapping[str, float], step: int) -> None:
    """Log numbers with every logger there is."""
    for logger in loggers:
        logger.log_metrics(dict(scalars), step=step)


def add_card(loggers: Iterable[Logger], tag: str, text: str, step: int) -> None:
    """Show a text (Markdown) with every logger that can show one: TensorBoard and Weights & Biases."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, step)
        elif hasattr(logger, "log_text"):
            logger.log_text(key=tag, columns=["text"], data=[[text]], step=step)


def card(event: SpikeEvent, decision: str, detail: str) -> str:
    """An event as Markdown: what, where, which samples, what was done."""
    rows = [
        ("what", event.message()),
        ("done", f"{decision}: {detail}" if detail else decision),
        ("where", f"step {event.step}, epoch {event.epoch}, batch {event.batch}, rank {event.rank}"),
        ("samples", ", ".join(map(str, event.samples)) if event.samples else "not named by the batch"),
        ("signals", ", ".join(f"{name} {value:.6g}" for name, value in event.signals.items())),
    ]
    cells = [(name, text.replace("|", "\\|").replace("\n", " ")) for name, text in rows]
    return "\n".join([f"| {event.kind} | |", "|---|---|", *(f"| {name} | {text} |" for name, text in cells)])


def purge_after(logger: Logger, step: int) -> bool:
    """Make TensorBoard drop what this logger wrote at ``step`` and later; False for a logger that cannot.

    What is logged from now on may use those steps again. Call it on the process that writes (global rank zero), after
    the last point of the abandoned steps has been written.

    Args:
        logger: any logger of the trainer.
        step: on the logger's axis.
    """
    if not isinstance(logger, TensorBoardLogger):
        return False
    # Takes half a second, and is only wanted here.
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

    writer = logger.experiment._get_file_writer()
    for _ in range(2):  # the first start of a run is none anew: what TensorBoard reads with drops nothing for it
        writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
    return True


def _tags(logger: TensorBoardLogger, *names: str) -> list[str]:
    return [_prefixed(logger, f"spike/{name}") for name in names]


def _prefixed(logger: TensorBoardLogger, name: str) -> str:
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}" if logger._prefix else name
