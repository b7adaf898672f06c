"""What an epoch has summed up so far: values logged with ``self.log`` and the states of torchmetrics.

A rollback must take the abandoned steps out of these sums too, or one NaN among them makes the epoch's mean NaN.
"""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from lowbit_lightning.spikes.host_copy import HostCopy

# What a torchmetrics Metric keeps beside its declared states.
_FIELDS = ("_update_count", "_computed", "_forward_cache", "has_reset")


def save(host: HostCopy, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Copies the sums to ``host``, between its ``begin`` and its ``end``; returns what ``restore`` takes."""
    metrics = enumerate(_metrics(trainer, pl_module))
    return {
        "results": {key: _save(host, f"results/{key}", metric) for key, metric in _results(trainer).items()},
        "metrics": [_save(host, f"metrics/{i}", metric) for i, metric in metrics],
        "logged": [host.pack(f"logged/{i}", values) for i, values in enumerate(_logged(trainer))],
    }


def restore(host: HostCopy, trainer: Trainer, pl_module: LightningModule, saved: dict[str, Any], *, keep: bool) -> None:
    """Puts the sums back.

    Args:
        host: The filled copy.
        trainer: The trainer.
        pl_module: Its module.
        saved: What ``save`` returned.
        keep: Whether the run is then in the epoch of the sums; if not, the present epoch's begin anew, because every
            step of it is abandoned.

    """
    results, metrics = _results(trainer), list(_metrics(trainer, pl_module))
    for live, values in zip(_logged(trainer), saved["logged"], strict=True):
        live.update(host.unpack(values))
    if not keep:
        for metric in [*results.values(), *metrics]:
            metric.reset()
        return
    for key in [key for key in results if key not in saved["results"]]:
        del results[key]
    for key, fields in saved["results"].items():
        if key in results:
            vars(results[key]).update(host.unpack(fields))
    for metric, fields in zip(metrics, saved["metrics"], strict=False):
        vars(metric).update(host.unpack(fields))


def _results(trainer: Trainer) -> dict[str, Any]:
    results: dict[str, Any] = trainer.fit_loop.epoch_loop._results
    return results


def _metrics(trainer: Trainer, pl_module: LightningModule) -> Iterator[Metric]:
    # The module's first: metrics logged for the first time after the snapshot then come last.
    logged = (result.value for result in _results(trainer).values() if not result.is_tensor)
    found = {id(one): one for one in [*pl_module.modules(), *logged] if isinstance(one, Metric)}
    yield from found.values()


def _save(host: HostCopy, name: str, metric: Metric) -> dict[str, Any]:
    fields = [*metric._defaults, *_FIELDS]
    return {field: host.pack(f"{name}/{field}", vars(metric)[field]) for field in fields if field in vars(metric)}


def _logged(trainer: Trainer) -> list[dict[str, Any]]:
    """What callbacks, loggers and the progress bar saw last."""
    connector = trainer._logger_connector
    return [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics]
