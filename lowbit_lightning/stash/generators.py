"""The state of a device's random generator, to draw the same numbers again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def generator_state(device: torch.device) -> Tensor:
    """Return the state of a device's default generator, uint8 on the CPU."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


@contextmanager
def same_draws(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Draw in this context as from ``state`` on, and afterwards as if nothing had been drawn; None changes nothing."""
    if state is None:
        yield
        return
    now = generator_state(device)
    _set(device, state)
    try:
        yield
    finally:
        _set(device, now)


def _set(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state.cpu())
    else:
        torch.get_device_module(device).set_rng_state(state.cpu(), device)
