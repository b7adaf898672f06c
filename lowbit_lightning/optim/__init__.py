"""Optimizers with low-memory states. They are plain ``torch.optim`` optimizers and know nothing of Lightning."""

from lowbit_lightning.optim.adamw_state import adamw_state_dict
from lowbit_lightning.optim.base import LowBitOptimizer, state_bytes
from lowbit_lightning.optim.fzoo import FZOO
from lowbit_lightning.optim.mezo import MeZO
from lowbit_lightning.optim.micro_adam import MicroAdam
from lowbit_lightning.optim.schedule import WarmupCosine
from lowbit_lightning.optim.solo import SoloAdamW
from lowbit_lightning.optim.solo_settings import adjusted_beta1
from lowbit_lightning.optim.stable_spam import StableSPAM

__all__ = [
    "FZOO",
    "LowBitOptimizer",
    "MeZO",
    "MicroAdam",
    "SoloAdamW",
    "StableSPAM",
    "WarmupCosine",
    "adamw_state_dict",
    "adjusted_beta1",
    "state_bytes",
]
