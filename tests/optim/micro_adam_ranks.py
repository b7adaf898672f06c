"""What each of two processes does in the tests of MicroAdam's sharded parameters, and the same work for one process."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowbit_lightning.callbacks.compression_monitor import compression_scalars
from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.optim import MicroAdam, state_bytes

STEPS, SAVED_AT = 6, 3
BLOCK = 256
#: Shards of whole blocks, with vectors and small matrices, which get AdamW.
ALIGNED = {"even": (8, 192), "wide": (2, 1024), "convolution": (4, 32, 3, 4), "vector": (77,), "narrow": (5, 3)}
#: Shards that end within blocks, one smaller than the other, and nothing for the second process.
UNALIGNED = {"cut": (6, 100), "uneven": (7, 192), "single_row": (1, 1000)}
SHAPES = ALIGNED | UNALIGNED
#: (step, parameter, row, value): gradients that only one of two processes can see to be unusable.
NONFINITE = [(1, "even", -1, float("nan")), (2, "single_row", 0, 2.0**64), (2, "uneven", -1, float("inf"))]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETTINGS: dict[str, Any] = {
    "lr": 1e-2, "weight_decay": 0.1, "min_numel": 100, "window": 2, "density": 0.05, "topk_block": BLOCK,
    "error_block": 64, "error_rounding": "stochastic", "seed": 3,
}  # fmt: skip
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def make(dtype: torch.dtype, sharded: bool, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[Weights, MicroAdam]:
    weights = Weights(dtype, shapes)
    if sharded:
        fully_shard(weights)
    return weights, MicroAdam(weights.named_parameters(), **SETTINGS)


def gradient(name: str, param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name.split(".")[0]))
    grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    for when, where, row, value in NONFINITE:
        if (when, where) == (step, name):
            grad[row] = value
    return grad


def run(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, param in module.named_parameters():
            grad = gradient(name, param, step)
            sharded = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if sharded else grad
        optimizer.step()


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


def result(module: nn.Module, optimizer: MicroAdam) -> dict[str, Any]:
    """Everything that training changes, and what is told of it, with whole tensors."""
    names = {param: name for name, param in module.named_parameters()}
    return {
        "weights": {name: whole(param.detach()).clone() for param, name in names.items()},
        "states": {names[param]: whole(state) for param, state in optimizer.state.items()},
        "skips": optimizer.param_groups[0]["nonfinite_skips"],
        "errors": {name: whole(optimizer.dequantized_error(param)) for param, name in names.items()},
        "moments": {name: whole(optimizer.dequantized_state(param)) for param, name in names.items()},
        "compression": {name: optimizer.compression(param) for param, name in names.items()},
        "scalars": compression_scalars([optimizer]),
        "rows": optimizer.describe_technique(),
    }


def work(rank: int, folder: Path) -> None:
    """Run everything and write what came of it to ``folder``, by rank."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {name: _train_and_save(folder / name, dtype) for name, dtype in DTYPES.items()}
    torch.save(found | {"refused": _refused()}, folder / f"{rank}.pt")


def _train_and_save(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    weights, optimizer = make(dtype, sharded=True)
    optimizer.initialize_state()
    found: dict[str, Any] = {"bytes": state_bytes(optimizer)}
    run(weights, optimizer, range(SAVED_AT))
    saved = {"model": get_model_state_dict(weights), "optimizer": get_optimizer_state_dict(weights, optimizer)}
    dcp.save(saved, checkpoint_id=folder)
    found["full"] = deepcopy(get_optimizer_state_dict(weights, optimizer, options=WHOLE))
    model = whole(deepcopy(saved["model"]))
    run(weights, optimizer, range(SAVED_AT, STEPS))
    found["end"] = result(weights, optimizer)

    weights, optimizer = make(dtype, sharded=True)
    resumed = {"model": get_model_state_dict(weights), "optimizer": get_optimizer_state_dict(weights, optimizer)}
    dcp.load(resumed, checkpoint_id=folder)
    set_model_state_dict(weights, resumed["model"])
    set_optimizer_state_dict(weights, optimizer, resumed["optimizer"])
    run(weights, optimizer, range(SAVED_AT, STEPS))
    found["resumed"] = result(weights, optimizer)

    weights, optimizer = make(dtype, sharded=True)
    set_model_state_dict(weights, model, options=FROM_RANK_0)
    set_optimizer_state_dict(weights, optimizer, found["full"], options=FROM_RANK_0)
    run(weights, optimizer, range(SAVED_AT, STEPS))
    found["resumed_from_full"] = result(weights, optimizer)
    return found


def _refused() -> dict[str, str]:
    """What is said of a state of one process where shards do not end on edges, and of parameters divided otherwise."""
    plain, optimizer = make(torch.float32, sharded=False, shapes={"cut": (6, 100)})
    run(plain, optimizer, range(1))
    saved = optimizer.state_dict()
    _, sharded = make(torch.float32, sharded=True, shapes={"cut": (6, 100)})
    found = {}
    try:
        sharded.load_state_dict(saved)
    except CheckpointError as error:
        found["state"] = str(error)
    mesh = init_device_mesh("cpu", (2,))
    for key, (dim, settings) in {"columns": (1, {}), "automatic": (0, {"density": "auto"})}.items():
        divided = nn.Parameter(distribute_tensor(torch.zeros(8, 192), mesh, [Shard(dim)]))
        try:
            MicroAdam([("layer", divided)], **(SETTINGS | settings))
        except InvalidArgumentError as error:
            found[key] = str(error)
    return found
