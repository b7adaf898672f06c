"""From low-bit states back to torch's: what lets a run go on with ``torch.optim.AdamW`` where SoloAdamW left it.

The opposite direction needs no function: SoloAdamW's ``load_state_dict`` takes over the state of a torch Adam or AdamW.
"""

from collections.abc import Callable
from typing import Any

import torch

from lowbit_lightning.optim.solo import SoloAdamW


def adamw_state_dict(optimizer: SoloAdamW, on_tensor: Callable[[], None] | None = None) -> dict[str, Any]:
    """Return the state of ``optimizer`` as ``torch.optim.AdamW.load_state_dict`` takes it, in tensors of its own.

    Moments are fp32 (8 bytes per parameter), those of :meth:`SoloAdamW.dequantized_state`. Groups keep their learning
    rate, the betas that were asked for (β₁ unadjusted), what schedulers wrote into them and the parameters' names, and
    lose what only SoloAdamW knows.

    Args:
        optimizer: whose state; it is left as it is. A parameter that it has not stepped yet has none.
        on_tensor: called after each parameter.
    """
    own = optimizer.state_dict()
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    only_solo = optimizer.defaults.keys() - defaults.keys()
    groups = [
        defaults | {key: value for key, value in group.items() if key not in only_solo} for group in own["param_groups"]
    ]
    saved_ids = (saved_id for group in groups for saved_id in group["params"])
    state = {}
    for saved_id, (_, _, param) in zip(saved_ids, optimizer.named_params(), strict=True):
        if optimizer.state.get(param):
            step = optimizer.state[param]["step"].detach().to("cpu", copy=True)
            state[saved_id] = {"step": step, **optimizer.dequantized_state(param)}
        if on_tensor is not None:
            on_tensor()
    return {"state": state, "param_groups": groups}
