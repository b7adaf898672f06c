"""Optimizers with low-memory states. They are plain ``torch.optim`` optimizers and know nothing of Lightning."""

from .base import LowBitOptimizer, state_bytes
from .schedule import WarmupCosine
from .solo import SoloAdamW, adjusted_beta1

__all__ = ["LowBitOptimizer", "SoloAdamW", "WarmupCosine", "adjusted_beta1", "state_bytes"]
