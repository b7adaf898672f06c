"""A run of somebody else's module with techniques on it, made from configuration as ``lowbit-lightning fit`` does."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from contract.registry import Config, Technique
from contract.third_party import STEPS_TO_ZERO, NextByte
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lowbit_lightning.cli import LowBitCLI

STEPS, SAVED_AT = 36, 19  # three epochs; a checkpoint in the middle of the second
SCHEDULE = {
    "class_path": "torch.optim.lr_scheduler.LinearLR",
    "init_args": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": STEPS_TO_ZERO},
}


def configuration(
    technique: Technique, *, seed: int = 0, module: type[LightningModule] = NextByte, **trainer: Any
) -> Config:
    """What the user's YAML files add up to: their module, data and trainer, and the technique."""
    config: Config = {
        "seed_everything": seed,
        "model": {"class_path": f"{module.__module__}.{module.__qualname__}"},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **technique.trainer,
            **trainer,
        },
    }
    config["trainer"]["callbacks"] = [*trainer.get("callbacks", []), *technique.callbacks]
    if technique.optimizer is not None:
        config |= {"optimizer": technique.optimizer, "lr_scheduler": SCHEDULE, "scheduler_interval": "step"}
    return deepcopy(config)


def resumable(folder: Path) -> Config:
    """Trainer settings of a run that can go on from checkpoints in ``folder``."""
    checkpoint = {"dirpath": str(folder), "every_n_train_steps": SAVED_AT, "save_top_k": -1}
    return {
        "enable_checkpointing": True,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
            {"class_path": "lowbit_lightning.callbacks.ExactResume"},
        ],
    }


def write(config: Config, name: str = "run.yaml") -> str:
    """Write a YAML file to the working folder, which is the test's own; returns its name."""
    Path(name).write_text(yaml.safe_dump(config))
    return name


class Record(Callback):
    """What happened in a run, for the tests to look at."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.gradient_norms: list[float] = []
        self.batches: list[Tensor] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch.clone())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad.norm() for parameter in pl_module.parameters() if parameter.grad is not None]
        if gradients:
            self.gradient_norms.append(float(torch.stack(gradients).norm()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})


class Run:
    """One run, ready to fit.

    Attributes:
        trainer: The Trainer.
        module: What it trains.
        record: What happened.
        techniques: The callbacks of the techniques, which have states of their own.
    """

    def __init__(self, technique: Technique, **options: Any) -> None:
        cli = LowBitCLI(["--config", write(configuration(technique, **options))], run=False)
        self.trainer: Trainer = cli.trainer
        self.module: LightningModule = cli.model
        self.record = Record()
        self.trainer.callbacks.insert(0, self.record)
        named = {callback["class_path"] for callback in technique.callbacks}
        self.techniques = [callback for callback in self.trainer.callbacks if _is_one_of(callback, named)]

    def fit(self, ckpt_path: Path | None = None) -> "Run":
        """Train; returns itself."""
        self.trainer.fit(self.module, ckpt_path=ckpt_path)
        return self

    def state(self) -> dict[str, Any]:
        """Everything that training changes and a rollback must bring back."""
        return {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs],
            "callbacks": [callback.state_dict() for callback in self.techniques],
            "precision": self.trainer.precision_plugin.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Bring back what :meth:`state` returned."""
        state = deepcopy(state)  # torch's own optimizers go on in the very tensors they load
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for config, saved in zip(self.trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        for callback, saved in zip(self.techniques, state["callbacks"], strict=True):
            callback.load_state_dict(saved)
        self.trainer.precision_plugin.load_state_dict(state["precision"])


def _is_one_of(callback: Callback, class_paths: set[str]) -> bool:
    names = {path.rpartition(".")[2] for path in class_paths}
    return type(callback).__name__ in names


def state_dtypes(run: Run) -> dict[tuple[int, str], torch.dtype]:
    """The dtype of every optimizer state, by parameter and key."""
    state = run.trainer.optimizers[0].state_dict()["state"]
    return {(index, key): value.dtype for index, entry in state.items() for key, value in entry.items()}


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Names every place where two nested states differ, in one bit of a tensor or in its dtype."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype:
            yield f"{where}: {one.dtype}, {other.dtype}"
        elif not torch.equal(one, other):
            yield f"{where}: other values"
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for position, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}[{position}]")
    elif one != other:
        yield f"{where}: {one!r}, {other!r}"
