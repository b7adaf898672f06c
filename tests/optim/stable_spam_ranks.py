"""What each of two processes does in the test of Stable-SPAM on sharded parameters, and the same in one process."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lowbit_lightning.optim import StableSPAM
from lowbit_lightning.optim.gradient_batch import GradientBatch
from lowbit_lightning.optim.gradient_rules import AdaClip, AdaGC, AdaGN, ZClip

STEPS, SAVED_AT = 6, 3
#: Divided evenly, unevenly, with nothing for the second process, and within a row.
SHAPES = {"even": (8, 20), "uneven": (7, 32), "single_row": (1, 100), "vector": (33,)}
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "reset_interval": 4, "seed": 3}


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def give_gradients(module: nn.Module, step: int) -> None:
    """A spike in the last row of every tensor in step 2, and in step 4 what only one of two processes can see."""
    for index, (name, param) in enumerate(module.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * step + index)
        grad = torch.randn(param.shape, generator=generator)
        if step == 2:
            grad[-1] *= 50
        if step == 4 and name == "uneven":
            grad[-1, 3] = math.nan
        grad = grad.to(param.dtype)
        sharded = isinstance(param, DTensor)
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if sharded else grad


def run(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(module, step)
        optimizer.step()


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


def result(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {param: name for name, param in module.named_parameters()}
    return {
        "weights": {name: whole(param.detach()).clone() for param, name in names.items()},
        "states": {names[param]: whole(state) for param, state in optimizer.state.items()},
        "skips": optimizer.param_groups[0]["nonfinite_skips"],
    }


def stabilized(module: nn.Module) -> list[dict[str, Any]]:
    """Gradients after rules, as whole tensors, step by step."""
    rules = [AdaClip(0.9), AdaGC(warmup_steps=2), AdaGN(), ZClip(warmup_steps=2)]
    optimizer, found = torch.optim.SGD(module.parameters(), lr=0.1), []
    named = dict(module.named_parameters())
    for step in range(STEPS):
        give_gradients(module, step)
        batch = GradientBatch(list(named.values()), list(named))
        for rule in rules:
            rule.apply(batch, optimizer, "0")
        batch.write()
        found.append({name: whole(param.grad) for name, param in named.items()})
    return found


def partial_sums() -> dict[str, Tensor]:
    """Replicated weights whose gradients are sums over the processes that are still to be made."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Replicate()]))
    param.grad = DTensor.from_local(torch.full((4, 6), 1.5), mesh, [Partial()], run_check=False)
    batch = GradientBatch([param], ["weight"])
    batch.scale(torch.tensor([2.0]))
    batch.write()
    return {"norms": batch.norms, "grad": whole(param.grad)}


def divided_columns() -> dict[str, Any]:
    mesh, weights = init_device_mesh("cpu", (2,)), Weights(torch.bfloat16)
    for key, param in list(weights.named_parameters()):
        divided = distribute_tensor(param.detach(), mesh, [Shard(min(1, param.ndim - 1))])
        weights.register_parameter(key, nn.Parameter(divided))
    optimizer = StableSPAM(weights.named_parameters(), **SETTINGS)
    run(weights, optimizer, range(STEPS))
    return result(weights, optimizer)


def work(rank: int, folder: Path) -> None:
    """Run everything and write what came of it to ``folder``, by rank."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = Weights(dtype)
        fully_shard(weights)
        optimizer = StableSPAM(weights.named_parameters(), **SETTINGS)
        run(weights, optimizer, range(SAVED_AT))
        full = StateDictOptions(full_state_dict=True)
        saved = deepcopy(get_optimizer_state_dict(weights, optimizer, options=full))
        before = {name: whole(param.detach()).clone() for name, param in weights.named_parameters()}
        run(weights, optimizer, range(SAVED_AT, STEPS))
        found[str(dtype)] = result(weights, optimizer)

        resumed = Weights(dtype)
        for name, param in resumed.named_parameters():
            param.data.copy_(before[name])
        fully_shard(resumed)
        again = StableSPAM(resumed.named_parameters(), **SETTINGS)
        from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(resumed, again, saved, options=from_rank_0)
        run(resumed, again, range(SAVED_AT, STEPS))
        found[f"resumed {dtype}"] = result(resumed, again)
    sharded = Weights(torch.float32)
    fully_shard(sharded)
    found |= {"rules": stabilized(sharded), "partial": partial_sums(), "columns": divided_columns()}
    torch.save(found, folder / f"{rank}.pt")
