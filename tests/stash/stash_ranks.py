"""What each of two processes does in the test of a stash on a sharded model, and the same work for a single process."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_lightning.callbacks import DynamicStashing

#: How a model is divided: by layers, or each norm and the head by themselves too.
WAYS = ("layers", "every module")


class Sharded(LightningModule):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=128, use_cache=False, **shape)).train()
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            if self.way == "every module":
                for part in (layer.input_layernorm, layer.self_attn, layer.mlp.up_proj):
                    fully_shard(part, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        if self.way == "every module":
            fully_shard(self.model.model.norm, mesh=mesh)
            fully_shard(self.model.lm_head, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(way: str, folder: Path, sharded: bool) -> dict[str, Any]:
    """Three steps on batches that are the same in every process; returns whole weights and what was kept."""
    # Without noise, which is each rank's own.
    # What is recomputed depends on the way, so the second one is compared at 16 bits, where that makes no difference.
    bits = 4 if way == "layers" else 16
    by_kind = dict.fromkeys(("norm", "loss", "other"), max(8, bits))
    stashing = DynamicStashing(stash_only=bits, by_kind=by_kind, rounding="nearest")
    rows = torch.randint(0, 128, (12, 24), generator=torch.Generator().manual_seed(2))
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "auto"
    trainer = Trainer(
        accelerator="cpu", devices=2 if sharded else 1, strategy=strategy, max_steps=3, callbacks=[stashing],
        default_root_dir=folder, use_distributed_sampler=False, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    module = Sharded(way)
    trainer.fit(module, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    weights = {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in module.named_parameters()
    }
    return {"weights": weights, "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()}}


def work(rank: int, folder: Path) -> None:
    """Train in every way, and write what came of it to ``folder``."""
    torch.save({way: train(way, folder, sharded=True) for way in WAYS}, folder / f"{rank}.pt")
