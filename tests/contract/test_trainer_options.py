"""Trainer settings work with every technique, or are refused before the first step: never silently ignored."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.conftest import Trained
from contract.registry import Technique, each_technique, every_technique
from contract.small_run import Run, state_dtypes

from lowbit_lightning.errors import LowBitError
from lowbit_lightning.optim import LowBitOptimizer

Trains = Callable[[Technique], Trained]
STEPS = 6


def fit_or_refusal(technique: Technique, option: str, value: Any) -> Run | None:
    """The finished run, or None where the technique refused the option as its registry entry promises."""
    if option not in technique.rejects and f"{option}={value}" not in technique.rejects:
        return Run(technique, max_steps=STEPS, **{option: value}).fit()
    message = technique.rejects.get(option) or technique.rejects[f"{option}={value}"]
    with pytest.raises((LowBitError, ValueError), match=message):
        Run(technique, max_steps=STEPS, **{option: value}).fit()
    return None


def assert_trained(run: Run) -> None:
    assert all(math.isfinite(loss) for loss in run.record.losses)
    first, last = run.record.weights[0], run.record.weights[-1]
    assert [name for name in first if torch.equal(first[name], last[name])] == []


@every_technique
def test_accumulated_batches_make_one_step(technique: Technique) -> None:
    run = fit_or_refusal(technique, "accumulate_grad_batches", 2)
    if run is not None:
        assert_trained(run)
        assert len(run.record.losses) == 2 * STEPS
        moved = [
            any(not torch.equal(before[name], after[name]) for name in before)
            for before, after in zip(run.record.weights, run.record.weights[1:], strict=False)
        ]
        assert moved == [index % 2 == 0 for index in range(2 * STEPS - 1)]


@every_technique
def test_gradients_are_clipped_before_the_step(technique: Technique, trained: Trains) -> None:
    unclipped = trained(technique).run.record.gradient_norms[:STEPS]
    limit = min(unclipped, default=1.0) / 2  # a technique may compute no gradient
    run = fit_or_refusal(technique, "gradient_clip_val", limit)
    if run is not None:
        assert_trained(run)
        assert max(run.record.gradient_norms) <= limit * 1.001


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@each_technique
def test_bf16_trains_and_keeps_state_dtypes(technique: Technique, trained: Trains, precision: str) -> None:
    run = fit_or_refusal(technique, "precision", precision)
    if run is not None:
        assert_trained(run)
        weights = {parameter.dtype for parameter in run.module.parameters()}
        assert weights == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
        if isinstance(run.trainer.optimizers[0], LowBitOptimizer):
            assert state_dtypes(run) == state_dtypes(trained(technique).run)


@each_technique
def test_16_mixed_on_cpu_is_announced_as_bf16(technique: Technique) -> None:
    if {"precision", "precision=16-mixed"} & technique.rejects.keys():
        assert fit_or_refusal(technique, "precision", "16-mixed") is None
        return
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        run = Run(technique, max_steps=STEPS, precision="16-mixed").fit()
    assert_trained(run)
