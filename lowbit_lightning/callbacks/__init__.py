"""Lightning callbacks. They compose: any of them works on any LightningModule, in any order."""

from lowbit_lightning.callbacks.exact_resume import ExactResume
from lowbit_lightning.callbacks.memory_ledger import MemoryLedger
from lowbit_lightning.callbacks.quantize_optimizer_states import QuantizeOptimizerStates
from lowbit_lightning.callbacks.swamping_monitor import SwampingMonitor

__all__ = ["ExactResume", "MemoryLedger", "QuantizeOptimizerStates", "SwampingMonitor"]
