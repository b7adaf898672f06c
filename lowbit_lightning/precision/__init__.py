"""Lightning precision plugins: what decides the numbers that a forward and a backward pass compute with."""

from lowbit_lightning.precision.four_bit import FourBitPrecision

__all__ = ["FourBitPrecision"]
