"""The optimizers that ``bench optim`` lets run against each other, all AdamW with the same settings.

Peers are imported only when asked for. One that is missing, or that cannot step these tensors on this device, is a row
of the table that says why, never the end of the run.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lowbit_lightning.optim import MicroAdam, SoloAdamW, StableSPAM

BASELINE = "torch fused"

_LR, _WEIGHT_DECAY = 1e-3, 1e-2
_Make = Callable[[Sequence[nn.Parameter]], Optimizer]


class UnavailableError(Exception):
    """Why an optimizer cannot take part, in a few words."""


def _torch(implementation: Literal["fused", "foreach"]) -> _Make:
    fused = implementation == "fused"
    return lambda params: torch.optim.AdamW(params, _LR, weight_decay=_WEIGHT_DECAY, fused=fused, foreach=not fused)


def _peer(package: str, module: str, name: str) -> _Make:
    def make(params: Sequence[nn.Parameter]) -> Optimizer:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise UnavailableError(f"{package} is not installed: pip install {package}") from error
        optimizer: Optimizer = getattr(importlib.import_module(module), name)(params, _LR, weight_decay=_WEIGHT_DECAY)
        return optimizer

    return make


def _solo(first: int, second: int) -> _Make:
    return lambda params: SoloAdamW(params, _LR, weight_decay=_WEIGHT_DECAY, bits=(first, second))


CONTENDERS: dict[str, _Make] = {
    BASELINE: _torch("fused"),
    "torch foreach": _torch("foreach"),
    "torchao 8-bit": _peer("torchao", "torchao.optim", "AdamW8bit"),
    "torchao 4-bit": _peer("torchao", "torchao.optim", "AdamW4bit"),
    "torchao fp8": _peer("torchao", "torchao.optim", "AdamWFp8"),
    "bitsandbytes 8-bit": _peer("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    "SoloAdamW 8/8": _solo(8, 8),
    "SoloAdamW 4/2": _solo(4, 2),
    "SoloAdamW 2/2": _solo(2, 2),
    "MicroAdam": lambda params: MicroAdam(params, _LR, weight_decay=_WEIGHT_DECAY),
    "StableSPAM": lambda params: StableSPAM(params, _LR, weight_decay=_WEIGHT_DECAY),
}


def build(name: str, params: Sequence[nn.Parameter]) -> Optimizer:
    """Return the optimizer ``name`` on ``params``.

    Raises:
        UnavailableError: It is not installed, or cannot be built; the message is the reason.
    """
    try:
        return CONTENDERS[name](params)
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(reason(error)) from error


def reason(error: BaseException) -> str:
    """Return the type and the first line of an error, short enough for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160].rstrip(": ")


@contextmanager
def peers_silenced() -> Iterator[None]:
    """Keep what peers warn of and log, mostly about features that are not measured, out of the progress lines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
