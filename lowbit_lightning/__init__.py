"""Low-memory and low-precision training for any LightningModule, from YAML alone.

Importing this package is cheap on purpose: ``lowbit-lightning list`` must answer without loading torch. Import the
rooms you need: :mod:`lowbit_lightning.optim`, :mod:`~lowbit_lightning.callbacks`, :mod:`~lowbit_lightning.models`,
:mod:`~lowbit_lightning.data`, :mod:`~lowbit_lightning.cli`.
"""

__version__ = "0.1.0"
