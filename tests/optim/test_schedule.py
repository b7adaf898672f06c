"""WarmupCosine: the shape of the curve and its bad inputs."""

import pytest
import torch
from torch import nn

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import WarmupCosine


def rates(warmup_steps: int, total_steps: int, min_lr_ratio: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupCosine(optimizer, warmup_steps, total_steps, min_lr_ratio)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_rises_linearly_then_falls_along_a_cosine_and_stays() -> None:
    seen = rates(4, 12, 0.1, 16)
    assert seen[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert seen[8] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert seen[12:] == pytest.approx([0.2] * 4)


def test_state_dict_loads_with_weights_only(tmp_path) -> None:  # type: ignore[no-untyped-def]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupCosine(optimizer, 2, 10)
    torch.save(scheduler.state_dict(), tmp_path / "schedule.pt")
    scheduler.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))


@pytest.mark.parametrize("arguments", [(0, None), (-1, 10), (0, 10, 1.5)])
def test_bad_arguments_are_named(arguments: tuple[float, ...]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    with pytest.raises(InvalidArgumentError, match=r"total_steps|warmup_steps|min_lr_ratio"):
        WarmupCosine(optimizer, *arguments)  # type: ignore[arg-type]
