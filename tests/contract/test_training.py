"""Every technique trains somebody else's module, unchanged, and stays out of what is not its own."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.conftest import Trained
from contract.registry import CASES, Technique, each_technique, every_technique
from contract.small_run import Run
from contract.third_party import STEPS_TO_ZERO, Awkward, NextByte, Overflowing

Trains = Callable[[Technique], Trained]


@every_technique
def test_loss_falls_on_real_text(technique: Technique, trained: Trains) -> None:
    losses = trained(technique).run.record.losses
    first, last = (sum(part) / len(part) for part in (losses[:4], losses[-4:]))
    assert last < technique.learns_to * first


@every_technique
def test_learning_rate_schedule_is_honoured(technique: Technique, trained: Trains) -> None:
    record = trained(technique).run.record
    expected = [technique.learning_rate * max(0.0, 1 - step / STEPS_TO_ZERO) for step in range(len(record.rates))]
    assert record.rates == pytest.approx(expected)
    # At a learning rate of zero not one bit of a weight moves.
    still, last = record.weights[STEPS_TO_ZERO - 1], record.weights[-1]
    assert [name for name in still if not torch.equal(still[name], last[name])] == []


@each_technique
def test_module_is_left_as_it_came(technique: Technique) -> None:
    def traces(module: torch.nn.Module) -> dict[str, Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
        return {
            "classes": {cls: dict(vars(cls)) for cls in type(module).__mro__},
            "keys": list(module.state_dict()),
            "hooks": [(name, hook) for name, part in module.named_modules() for hook in hooks if getattr(part, hook)],
            "instance": vars(module).keys() - {"_hparams"},  # which Lightning adds to every module
        }

    before = traces(NextByte())
    if technique.optimizer is not None:
        before["instance"] |= {"configure_optimizers"}  # the command line binds any configured optimizer
    assert traces(Run(technique, max_steps=2).fit().module) == before


@each_technique
def test_parameters_without_a_gradient_do_not_move(technique: Technique) -> None:
    run = Run(technique, module=Awkward, max_steps=6).fit()
    weights = dict(run.module.named_parameters())
    for name in ("unused",) if technique.moves_without_gradient else ("unmoved", "unused"):
        assert torch.equal(weights[name], torch.ones(64, 64)), name
    assert weights["empty"].shape == (0, 64)
    assert weights["temperature"].item() != 0.5
    assert torch.isfinite(torch.cat([value.flatten() for value in weights.values()])).all()


@pytest.mark.parametrize("technique", [case for case in CASES if case.values[0].survives_nonfinite])
def test_nonfinite_gradients_are_survived(technique: Technique) -> None:
    record = Run(technique, module=Overflowing, max_steps=6).fit().record
    assert not math.isfinite(record.losses[2])
    before, hit, last = (torch.cat([w.flatten() for w in record.weights[step].values()]) for step in (1, 2, 5))
    assert torch.equal(before, hit)
    assert torch.isfinite(last).all()
    assert not torch.equal(hit, last)
