"""The generators that a forward pass may draw from, saved and put back so that a pass can be repeated exactly.

Zeroth-order training compares losses of one batch at slightly different weights: dropout masks, sampled augmentations
and mixing coefficients must be the same in all of them, or their differences drown what is being measured.
"""

import random
from collections.abc import Iterable
from typing import Any

import numpy
import torch


class RandomState:
    """The state of Python's, numpy's and torch's generators at one moment.

    Args:
        devices: whose generators are saved beside the CPU's.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._python = random.getstate()
        self._numpy: Any = numpy.random.get_state(legacy=False)
        self._torch = torch.get_rng_state()
        others = (device for device in devices if device.type != "cpu")
        self._devices = {device: _backend(device).get_rng_state(*_which(device)) for device in others}

    def restore(self) -> None:
        """Put every generator back."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for device, state in self._devices.items():
            _backend(device).set_rng_state(state, *_which(device))


def _backend(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one, and its functions take no argument
