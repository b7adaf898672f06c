"""The state of autocast in forward, so that what is computed again in backward is computed alike."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """Whether, and to what dtype, autocast casts on a type of device; ``dtype`` None is not at all."""

    device_type: str
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device: torch.device) -> "Autocast":
        """Return the state for a device."""
        if not torch.is_autocast_enabled(device.type):
            return cls(device.type, None)
        return cls(device.type, torch.get_autocast_dtype(device.type))

    def again(self) -> AbstractContextManager[object]:
        """Return a context in which it is so.

        Its cache of casted weights is off: one that is filled without gradients would be used with them later.
        """
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, cache_enabled=False)
