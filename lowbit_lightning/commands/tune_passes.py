"""How ``tune`` makes forward passes: in a fit that ends before its first step.

The run of the configuration is set up by its Trainer as ever (data, device, precision, strategy, optimizer). When
training would start, a callback makes the passes through the strategy's own training step, so they are exactly those of
the run: its batches, its dropout, its micro-batches. The start weights are kept once, in the CPU's memory; a learning
rate's weights are made from them again by repeating its updates, for which the losses of its steps are all it takes.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from tqdm import tqdm  # type: ignore[import-untyped]

from lowbit_lightning import __version__
from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.cli import LowBitCLI, quieten_lightning
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim.forward_only import ForwardOnlyOptimizer, scalar_loss
from lowbit_lightning.strategies.forward_only import ForwardOnlyMixin
from lowbit_lightning.strategies.replay import ModuleState, silent

from . import tune_report
from .tune_journal import Journal
from .tune_search import EPS_FACTORS, LR_FACTORS, EpsTrial, LrTrial, Plan, around, choose_eps, halve, make_plan


def run(arguments: list[str], forwards: int, out: Path) -> int:
    """Search, print what was tried, and write the overlay.

    Args:
        arguments: of ``fit``, after that word.
        forwards: forward passes there are.
        out: the file to write.

    Raises:
        LowBitError: anything the user can mend.
    """
    quieten_lightning()
    _TuneCLI(["fit", *arguments], forwards, out)
    return 0


class _TuneCLI(LowBitCLI):
    """Sets a run up as ``fit`` does, and searches where it would train."""

    def __init__(self, arguments: list[str], forwards: int, out: Path) -> None:
        self._forwards, self._out = forwards, out
        super().__init__(arguments)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, without its callbacks and loggers: nothing of a search is part of a run."""
        trainer = super().instantiate_trainer(**kwargs)
        if not isinstance(trainer.strategy, ForwardOnlyMixin) or not self._get(self.config_init, "optimizer"):
            raise InvalidArgumentError(
                "tune: the configuration has no forward-only optimizer to tune: it needs `optimizer:` "
                "lowbit_lightning.optim.FZOO or MeZO and `trainer.strategy: forward_only`; the technique fzoo has "
                "both: tune CONFIG fzoo"
            )
        if trainer.world_size > 1:
            raise InvalidArgumentError(
                f"tune: the run has {trainer.world_size} processes and tune takes one: add --trainer.devices=1 "
                "--trainer.num_nodes=1 --trainer.strategy=forward_only"
            )
        trainer.callbacks = []  # type: ignore[attr-defined]
        trainer.loggers = []
        return trainer

    def before_fit(self) -> None:
        """Refuse a checkpoint: steps are compared with those of a new run."""
        if (path := self.config_init["fit"]["ckpt_path"]) is not None:
            raise InvalidArgumentError(f"tune: ckpt_path={str(path)!r}: tune searches at the start of a run; remove it")

    def fit(self, model: LightningModule, datamodule: LightningDataModule | None = None, **_: Any) -> None:
        """Search instead of training."""
        configuration = __version__ + self.parser.dump(self.config, skip_none=False)
        journal = Journal(self._out.with_name(f"{self._out.name}.progress"), configuration)
        search = _Search(self._forwards, journal)
        self.trainer.callbacks.append(search)  # type: ignore[attr-defined]
        try:
            self.trainer.fit(model, datamodule=datamodule)
        finally:
            journal.close()
        assert search.eps is not None
        assert search.best is not None
        optimizer = self._get(self.config_init, "optimizer")["class_path"]
        text = _overlay(optimizer, search.best.lr, search.eps.eps, search.plan.forwards)
        with atomic_file(self._out) as file:
            file.write(text.encode())
        journal.remove()
        print(f"\n{self._out}: lr {search.best.lr:g}, eps {search.eps.eps:g}. Add it to the run: --config {self._out}")

    def after_fit(self) -> None:
        """Print no summary: nothing was trained."""


def _overlay(optimizer: str, lr: float, eps: float, forwards: int) -> str:
    name = optimizer.rpartition(".")[2]
    return (
        f"# lr and eps of {name}, found by `lowbit-lightning tune` in {forwards:,} forward passes\n"
        f"optimizer:\n  class_path: {optimizer}\n  init_args:\n    lr: {lr!r}\n    eps: {eps!r}\n"
    )


class _Search(Callback):
    """The search, between the start of training and its first step."""

    plan: Plan
    eps: EpsTrial | None = None
    best: LrTrial | None = None

    def __init__(self, forwards: int, journal: Journal) -> None:
        self._forwards = forwards
        self._journal = journal
        self._eps_trials: list[EpsTrial] = []
        self._lr_trials: list[LrTrial] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, then let the fit end."""
        passes = _Passes(trainer, pl_module, self._journal)
        self.plan = make_plan(self._forwards, passes.of_a_step, trainer.accumulate_grad_batches)
        with tqdm(total=self.plan.forwards, unit="pass", disable=None) as bar:
            passes.bar = bar
            try:
                self._search(passes)
            except KeyboardInterrupt:
                bar.close()
                print(self._report())
                print("\nInterrupted. The same command goes on from here.", flush=True)
                raise
            finally:
                passes.restore()
        print(self._report())
        assert self.best is not None
        if not self.best.is_better:
            raise InvalidArgumentError(
                f"tune: no lr from {min(passes.rates):g} to {max(passes.rates):g} lowers the loss in "
                f"{self.plan.steps[-1]} steps by more than it differs from batch to batch: give more --forwards (what "
                "has been measured is kept), or another --optimizer.init_args.lr to search around"
            )
        if self.best.lr in (min(passes.rates), max(passes.rates)):
            print(
                f"The best lr is at the end of what was tried: try again with --optimizer.init_args.lr={self.best.lr:g}"
            )
        trainer.should_stop = True
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def _report(self) -> str:
        return tune_report.tables(self._eps_trials, self.eps, self._lr_trials, self.best)

    def _search(self, passes: "_Passes") -> None:
        self._eps_trials = [EpsTrial(eps) for eps in around(passes.eps, EPS_FACTORS)]
        for step in range(self.plan.eps_batches):
            for trial in self._eps_trials:
                trial.norms.append(passes.gradient_norm(trial.eps, step))
        self.eps = choose_eps(self._eps_trials)
        self._lr_trials = [LrTrial(lr) for lr in passes.rates]
        eps = self.eps.eps
        self.best = halve(
            self._lr_trials,
            self.plan,
            lambda trial, steps: passes.train(trial, eps, steps),
            lambda step: passes.start_loss(eps, step),
        )


class _Passes:
    """Makes steps of the run from the start weights, each only once.

    Args:
        trainer: at the start of training.
        module: its module.
        journal: of the steps that are known already.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, journal: Journal) -> None:
        strategy, optimizer = trainer.strategy, trainer.optimizers[0]
        assert isinstance(optimizer, ForwardOnlyOptimizer)
        self._trainer, self._module, self._strategy, self._optimizer = trainer, module, strategy, optimizer
        self._journal = journal
        self._batches = _Batches(trainer, module)
        self._clock = optimizer.param_groups[0]
        self.eps = float(self._clock["eps"])
        self.rates = around(float(self._clock.get("initial_lr", self._clock["lr"])), LR_FACTORS)
        self.of_a_step = len(optimizer.evaluations()) * trainer.accumulate_grad_batches
        self.bar: Any = None
        self._start_state = deepcopy(optimizer.state_dict())
        self._start_weights = [(param, param.detach().to("cpu", copy=True)) for _, _, param in optimizer.trainable()]
        self._takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self._changing: set[str] = set()
        self._counted: set[str] = set()
        if self.rates[0] == 0:
            raise InvalidArgumentError("tune: the optimizer's lr is 0: give one to search around")

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the start weights."""
        for param, start in self._start_weights:
            param.copy_(start)
        self._optimizer.load_state_dict(deepcopy(self._start_state))
        self._clock = self._optimizer.param_groups[0]

    def gradient_norm(self, eps: float, step: int) -> float:
        """Return σ/ε at the present weights, which are the start weights before the first :meth:`train`."""
        self._set(eps=eps)
        self._clock["step"] = step
        self._collect(f"eps {eps!r} step {step}", step)
        norm = self._optimizer.gradient_norm()
        self._drop()
        return norm

    def start_loss(self, eps: float, step: int) -> float:
        """Return the loss of a step's batch at the start weights."""
        key = f"start eps {eps!r} step {step}"
        if self._journal.get(key) is None:
            self.restore()
            self._set(eps=eps)
            self._clock["step"] = step
            self._evaluate(key, step, others=False)
        self._count(key, self._trainer.accumulate_grad_batches)
        (loss,), _ = self._journal.get(key) or ([], [])
        return loss

    def train(self, trial: LrTrial, eps: float, steps: int) -> None:
        """Train from the start weights for a number of steps; what was done before costs updates but no passes."""
        self.restore()
        self._set(lr=trial.lr, eps=eps)
        for step in range(steps):
            loss = self._collect(f"lr {trial.lr!r} eps {eps!r} step {step}", step)
            trial.losses[step:] = [loss]
            if trial.diverged:
                return
            self._optimizer.step()

    def _set(self, **settings: float) -> None:
        for group in self._optimizer.param_groups:
            group.update(settings)

    def _drop(self) -> None:
        self._clock["pending_losses"], self._clock["pending_params"] = [], []

    def _collect(self, key: str, step: int) -> float:
        """Give the optimizer the losses of a step; returns the first one."""
        if self._journal.get(key) is None:
            self._evaluate(key, step)
            self._drop()
        self._count(key, self.of_a_step)
        losses, params = self._journal.get(key) or ([], [])
        self._clock["pending_losses"], self._clock["pending_params"] = list(losses), list(params)
        return losses[0]

    def _evaluate(self, key: str, step: int, others: bool = True) -> None:
        """Make a step's forward passes and keep their losses."""
        first = 0.0
        for index, batch in enumerate(self._batches.of_step(step)):
            # One seed for a step, whoever makes it and whenever: the dropout masks are the same for all that compare.
            seed_everything(step * self._trainer.accumulate_grad_batches + index, verbose=False)
            before = ModuleState(self._module, self._changing)
            with silent(self._module):
                output = self._strategy.training_step(*((batch, index) if self._takes_index else (batch,)))
            if output is None:
                raise InvalidArgumentError("tune: training_step returned None, so there is no loss to compare")
            first += float(scalar_loss(output)) / self._trainer.accumulate_grad_batches
            if others:
                self._strategy.backward(scalar_loss(output), None)
            self._changing |= before.changed_buffers()
            before.restore()
        losses, params = self._clock["pending_losses"], self._clock["pending_params"]
        self._journal.add(key, *((losses, params) if others else ([first], [])))

    def _count(self, key: str, passes: int) -> None:
        if key not in self._counted:
            self._counted.add(key)
            self.bar.set_description(key.partition(" step")[0], refresh=False)
            self.bar.update(passes)


class _Batches:
    """The run's training batches by step, on the device; going back starts the epoch anew."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._step = -1
        self._stream: Iterator[Any] = iter(())
        self._batches: list[Any] = []

    def of_step(self, step: int) -> list[Any]:
        """Return the micro-batches of a step."""
        if step < self._step or self._step < 0:
            self._stream, self._step = self._endless(), -1
        while self._step < step:
            self._batches = [next(self._stream) for _ in range(self._trainer.accumulate_grad_batches)]
            self._step += 1
        return [self._on_device(batch) for batch in self._batches]

    def _endless(self) -> Iterator[Any]:
        epoch = count = 0
        while True:
            loaders = self._trainer.train_dataloader
            combined = CombinedLoader(loaders, "max_size_cycle")
            for loader in combined.flattened:
                _set_sampler_epoch(loader, epoch)
            seed_everything(epoch, verbose=False)  # the order of a shuffling loader
            for batch, _, _ in combined:
                yield batch
                count += 1
            if not count:
                raise InvalidArgumentError("tune: the run has no training batches")
            epoch += 1

    def _on_device(self, batch: Any) -> Any:
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = self._module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)
