"""A small Llama that FSDP2 shards over two processes, and what comes of training it, to compare with one process."""

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


def fit(way: str, folder: Path, sharded: bool, **trainer: Any) -> dict[str, Any]:
    """Three steps on batches that are the same in every process; returns whole weights and metrics."""
    rows = torch.randint(0, 128, (12, 24), generator=torch.Generator().manual_seed(2))
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "auto"
    made = Trainer(
        accelerator="cpu", devices=2 if sharded else 1, strategy=strategy, max_steps=3,
        default_root_dir=folder, use_distributed_sampler=False, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, **trainer,
    )  # fmt: skip
    module = Sharded(way)
    made.fit(module, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    assert sharded == all(isinstance(param, DTensor) for param in module.parameters())
    weights = {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in module.named_parameters()
    }
    return {"weights": weights, "metrics": {name: float(value) for name, value in made.callback_metrics.items()}}
