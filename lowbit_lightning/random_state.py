"""Every random generator that a training step may draw from, as one value that can be kept and put back.

``ExactResume`` writes it into checkpoints, the snapshots of ``SpikeGuard`` hold it in memory.
"""

import random
from typing import Any

import numpy
import torch


def collect_rng() -> dict[str, Any]:
    """Returns the state of Python's, numpy's, torch's and every CUDA device's generator.

    Tensors and plain lists only, so that ``torch.load(weights_only=True)`` accepts a checkpoint that holds it.
    """
    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": [legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Sets every generator to what ``collect_rng`` returned; CUDA devices that are not here are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(key, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved.cpu(), device)
