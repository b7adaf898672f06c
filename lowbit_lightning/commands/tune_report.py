"""What ``tune`` shows: a table of the distances that were compared and one of the learning rates that were tried."""

import math
from collections.abc import Sequence

from lowbit_lightning.callbacks.memory_ledger import format_table

from .tune_search import EpsTrial, LrTrial


def tables(
    eps_trials: Sequence[EpsTrial], eps: EpsTrial | None, lr_trials: Sequence[LrTrial], best: LrTrial | None
) -> str:
    """Return what was tried so far, with what was chosen, if anything was."""
    eps_rows = [
        (f"{trial.eps:g}", _mean(trial.norms), _percent(trial.change), _remark(trial, eps)) for trial in eps_trials
    ]
    text = format_table(("eps", "sigma/eps", "to the next", ""), eps_rows)
    if eps is not None and not eps.is_flat:
        text += "\nNo two neighbours agree: eps is a guess. Losses in fp32 and more --forwards may help."
    if not lr_trials:
        return text
    lr_rows = [
        (f"{trial.lr:g}", str(len(trial.losses)), _signed(trial), "best" if trial is best else "")
        for trial in lr_trials
    ]
    return f"{text}\n\n" + format_table(("lr", "steps", "loss against the start", ""), lr_rows)


def _mean(norms: Sequence[float]) -> str:
    return f"{sum(norms) / len(norms):.4g}" if norms else ""


def _percent(change: float) -> str:
    return f"{change:.1%}" if math.isfinite(change) else ""


def _remark(trial: EpsTrial, chosen: EpsTrial | None) -> str:
    return ", ".join(["flat"] * trial.is_flat + ["chosen"] * (trial is chosen))


def _signed(trial: LrTrial) -> str:
    if trial.diverged or math.isnan(trial.change):
        return "diverged" if trial.diverged else ""
    return f"{trial.change:+.4f}" + (f" ± {trial.error:.4f}" if math.isfinite(trial.error) else "")
