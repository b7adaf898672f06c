"""Lightning strategies: what must replace the training step itself."""

from lowbit_lightning.strategies.forward_only import ForwardOnlyDDPStrategy, ForwardOnlyStrategy

__all__ = ["ForwardOnlyDDPStrategy", "ForwardOnlyStrategy"]
