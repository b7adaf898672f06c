"""Lightning callbacks. They compose: any of them works on any LightningModule, in any order."""

from lowbit_lightning.callbacks.compression_monitor import CompressionMonitor
from lowbit_lightning.callbacks.dynamic_stashing import DynamicStashing
from lowbit_lightning.callbacks.exact_resume import ExactResume
from lowbit_lightning.callbacks.gradient_stabilizer import GradientStabilizer
from lowbit_lightning.callbacks.memory_ledger import MemoryLedger
from lowbit_lightning.callbacks.quantize_optimizer_states import QuantizeOptimizerStates
from lowbit_lightning.callbacks.spike_guard import SpikeGuard
from lowbit_lightning.callbacks.spike_injector import SpikeInjector
from lowbit_lightning.callbacks.spike_monitor import SpikeMonitor
from lowbit_lightning.callbacks.swamping_monitor import SwampingMonitor

__all__ = [
    "CompressionMonitor",
    "DynamicStashing",
    "ExactResume",
    "GradientStabilizer",
    "MemoryLedger",
    "QuantizeOptimizerStates",
    "SpikeGuard",
    "SpikeInjector",
    "SpikeMonitor",
    "SwampingMonitor",
]
