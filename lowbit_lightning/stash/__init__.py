"""What a forward pass keeps for backward, really packed: activations of 2 to 8 bits on any module.

Knows modules and autograd; only :mod:`.schedule` knows Lightning. ``callbacks.DynamicStashing`` is the way to it from
YAML.
"""

from lowbit_lightning.stash.hooks import packed_by_hooks
from lowbit_lightning.stash.precision import KINDS, Kind, StashPrecision
from lowbit_lightning.stash.stash import Stash
from lowbit_lightning.stash.surgery import Patches, kinds_in, patch

__all__ = ["KINDS", "Kind", "Patches", "Stash", "StashPrecision", "kinds_in", "packed_by_hooks", "patch"]
