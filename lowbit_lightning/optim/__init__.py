"""Optimizers with low-memory states. They are plain ``torch.optim`` optimizers and know nothing of Lightning."""

from lowbit_lightning.optim.base import LowBitOptimizer, state_bytes
from lowbit_lightning.optim.schedule import WarmupCosine
from lowbit_lightning.optim.solo import SoloAdamW, adjusted_beta1

__all__ = ["LowBitOptimizer", "SoloAdamW", "WarmupCosine", "adjusted_beta1", "state_bytes"]
