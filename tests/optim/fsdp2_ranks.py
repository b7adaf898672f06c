"""What each of two processes does in the tests of sharded parameters, and the same work for a single process.

One launch serves all tests, because starting two processes takes longer than what they compute. Gradients are given, or
both processes see the same batches, so that a single process must end with the very same bits.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lowbit_lightning.callbacks import QuantizeOptimizerStates
from lowbit_lightning.data.resumable import ResumableDataLoader
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import SoloAdamW, state_bytes

STEPS, SAVED_AT = 5, 3
#: Rows that two processes share evenly, unevenly, and with nothing for the second; vectors cut within a block.
SHAPES = {
    "even": (8, 200),
    "uneven": (7, 320),
    "single_row": (1, 1000),
    "convolution": (5, 8, 3, 3),
    "narrow": (9, 5),
    "short_vector": (77,),
    "vector": (333,),
}
#: (step, parameter, row, value): gradients that only one of two processes can see to be unusable.
NONFINITE = [(1, "uneven", 6, float("nan")), (2, "single_row", 0, 2.0**64), (2, "vector", -1, float("inf"))]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETTINGS: dict[str, Any] = {"lr": 1e-2, "min_numel": 0, "seed": 3, "overrides": {"even": {"bits": (3, 8)}}}
#: Who makes the optimizer, and whether the checkpoint is a folder of shards or one file.
WAYS = [("module", True), ("callback", False)]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def make(dtype: torch.dtype, sharded: bool, **settings: Any) -> tuple[Weights, SoloAdamW]:
    weights = Weights(dtype)
    if sharded:
        fully_shard(weights)
    return weights, SoloAdamW(weights.named_parameters(), **(SETTINGS | settings))


def gradient(param: Tensor, step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def run(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range, nonfinite: bool = True) -> None:
    for step in steps:
        for index, (name, param) in enumerate(module.named_parameters()):
            grad = gradient(param, step, index)
            for when, where, row, value in NONFINITE if nonfinite else []:
                if (when, where) == (step, name):
                    grad[row] = value
            sharded = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if sharded else grad
        optimizer.step()


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


def result(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that training changes, with whole tensors."""
    names = {param: name for name, param in module.named_parameters()}
    return {
        "weights": {name: whole(param.detach()).clone() for param, name in names.items()},
        "states": {names[param]: whole(state) for param, state in optimizer.state.items()},
        "skips": optimizer.param_groups[0].get("nonfinite_skips"),
    }


class Regression(LightningModule):
    """Divides its layers if the strategy has a mesh; makes AdamW, or SoloAdamW itself."""

    def __init__(self, adamw: bool) -> None:
        super().__init__()
        self.adamw = adamw
        self.net: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(70, 65), nn.GELU(), nn.Linear(65, 1))
        if self.device_mesh is not None:
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.net is not None
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adamw:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return SoloAdamW(self.named_parameters(), lr=1e-2, min_numel=0)


def train(way: tuple[str, bool], folder: Path, sharded: bool = False) -> dict[str, Any]:
    """Fit, save, and go on from the checkpoint, on batches that are the same in every process."""
    by_callback, path = way[0] == "callback", folder / f"{way[0]}.ckpt"
    generator = torch.Generator().manual_seed(2)
    batches = ResumableDataLoader(torch.randn(16, 70, generator=generator), batch_size=4, rank=0, world_size=1)
    for until, ckpt_path in ((2, None), (5, path)):
        callbacks = [QuantizeOptimizerStates({"init_args": {"min_numel": 0}})] if by_callback else []
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=way[1]
        )
        trainer = Trainer(
            accelerator="cpu", devices=2 if sharded else 1, strategy=strategy if sharded else "auto", max_steps=until,
            callbacks=callbacks, default_root_dir=folder, use_distributed_sampler=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Regression(by_callback), batches, ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(path)
    return result(trainer.lightning_module, trainer.optimizers[0])


def work(rank: int, folder: Path) -> None:
    """Run everything and write what came of it to ``folder``, by rank."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {name: _train_and_save(folder / name, dtype) for name, dtype in DTYPES.items()}
    found |= {"adamw": _take_over_adamw(), "columns": _divided_columns(), "partial": _partial_gradients()}
    found |= {"lightning": {way: train(way, folder, sharded=True) for way in WAYS}}
    torch.save(found, folder / f"{rank}.pt")


def _train_and_save(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    weights, optimizer = make(dtype, sharded=True)
    optimizer.initialize_state()
    found: dict[str, Any] = {"bytes": state_bytes(optimizer)}
    run(weights, optimizer, range(SAVED_AT))
    saved = {"model": get_model_state_dict(weights), "optimizer": get_optimizer_state_dict(weights, optimizer)}
    dcp.save(saved, checkpoint_id=folder)
    found["full"] = deepcopy(get_optimizer_state_dict(weights, optimizer, options=WHOLE))
    found["moments"] = {name: whole(optimizer.dequantized_state(param)) for name, param in weights.named_parameters()}
    first_rows = optimizer.dequantized_state(weights.uneven, rows=2)
    found["first_rows"] = {key: value.clone() for key, value in first_rows.items()}
    found["rows"] = optimizer.dequantized_state(weights.uneven)["exp_avg"].to_local()
    plain_states = deepcopy({"model": whole(saved["model"]), "optimizer": whole(optimizer.state_dict()["state"])})
    groups = optimizer.state_dict()["param_groups"]
    run(weights, optimizer, range(SAVED_AT, STEPS))
    found["end"] = result(weights, optimizer)

    weights, optimizer = make(dtype, sharded=True)
    found["start"] = result(weights, optimizer)["weights"]
    resumed = {"model": get_model_state_dict(weights), "optimizer": get_optimizer_state_dict(weights, optimizer)}
    found["after_zero_step"] = result(weights, optimizer)
    dcp.load(resumed, checkpoint_id=folder)
    set_model_state_dict(weights, resumed["model"])
    set_optimizer_state_dict(weights, optimizer, resumed["optimizer"])
    run(weights, optimizer, range(SAVED_AT, STEPS))
    found["resumed"] = result(weights, optimizer)

    weights, optimizer = make(dtype, sharded=True)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(weights, dict(plain_states["model"]), options=from_rank_0)
    set_optimizer_state_dict(weights, optimizer, found["full"], options=from_rank_0)
    run(weights, optimizer, range(SAVED_AT, STEPS))
    found["resumed_from_full"] = result(weights, optimizer)

    weights, optimizer = make(dtype, sharded=True)
    set_model_state_dict(weights, dict(plain_states["model"]), options=from_rank_0)
    optimizer.load_state_dict({"state": plain_states["optimizer"], "param_groups": groups})
    run(weights, optimizer, range(SAVED_AT, STEPS))
    found["resumed_from_plain"] = result(weights, optimizer)
    return found


def _take_over_adamw() -> dict[str, Any]:
    weights, _ = make(torch.float32, sharded=True)
    adamw = torch.optim.AdamW(weights.parameters(), lr=1e-2)
    run(weights, adamw, range(SAVED_AT), nonfinite=False)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    full = get_optimizer_state_dict(weights, adamw, options=StateDictOptions(full_state_dict=True))
    adamw.zero_grad()
    by_shards, by_checkpoint = (SoloAdamW(weights.named_parameters(), **SETTINGS) for _ in range(2))
    by_shards.load_state_dict(adamw.state_dict())
    set_optimizer_state_dict(weights, by_checkpoint, full, options=options)
    return {
        "full": full,
        **{f"by_{n}": result(weights, o) for n, o in (("shards", by_shards), ("checkpoint", by_checkpoint))},
    }


def _divided_columns() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        weights = Weights(dtype)
        for key, param in list(weights.named_parameters()):
            divided = distribute_tensor(param.detach(), mesh, [Shard(min(1, param.ndim - 1))])
            weights.register_parameter(key, nn.Parameter(divided))
        try:
            SoloAdamW(weights.named_parameters(), **SETTINGS)
        except InvalidArgumentError as error:
            found["error"] = str(error)
        optimizer = SoloAdamW(weights.named_parameters(), **(SETTINGS | {"overrides": {}, "bits": (32, 32)}))
        run(weights, optimizer, range(STEPS))
        found[name] = result(weights, optimizer)
    return found


def _partial_gradients() -> dict[str, Any]:
    """Replicated weights whose gradients are sums over the processes, as tensor parallelism leaves those of norms."""
    mesh = init_device_mesh("cpu", (2,))
    weights = Weights(torch.bfloat16)
    for name, param in list(weights.named_parameters()):
        weights.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Replicate()])))
    optimizer = SoloAdamW(weights.named_parameters(), **SETTINGS)
    for step in range(STEPS):
        for index, param in enumerate(weights.parameters()):
            half = gradient(param, step, index) / 2
            param.grad = DTensor.from_local(half, mesh, [Partial()], run_check=False)
        optimizer.step()
    return result(weights, optimizer)
