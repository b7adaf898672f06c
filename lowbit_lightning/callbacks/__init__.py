"""Lightning callbacks. They compose: any of them works on any LightningModule, in any order."""

from lowbit_lightning.callbacks.exact_resume import ExactResume
from lowbit_lightning.callbacks.memory_ledger import MemoryLedger

__all__ = ["ExactResume", "MemoryLedger"]
