"""LowBitCLI: Lightning's own command line, with the optimizer built late and with errors that say what to do.

Everything else is the stock :class:`~lightning.pytorch.cli.LightningCLI`, so a configuration moves between the two.
What differs: ``optimizer:`` and ``lr_scheduler:`` are built inside ``configure_optimizers`` from named parameters
(:mod:`lowbit_lightning.late_optimizer`); short class names of this package resolve; ``--config NAME`` finds shipped
files; a :class:`~lowbit_lightning.callbacks.MemoryLedger` is always there; checkpoints are never torn.
"""

import logging
import pickle
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeTuple,
    SaveConfigCallback,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

# Imported for their classes: jsonargparse resolves a short name such as `CausalLM` among the classes it has seen.
import lowbit_lightning.data
import lowbit_lightning.models
import lowbit_lightning.optim
import lowbit_lightning.precision
import lowbit_lightning.strategies  # noqa: F401
from lowbit_lightning import checkpoints, late_optimizer
from lowbit_lightning.__main__ import main
from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.callbacks import MemoryLedger, QuantizeOptimizerStates
from lowbit_lightning.config_errors import ConfigParser, ConfigProblem, explain
from lowbit_lightning.config_sources import resolve_names
from lowbit_lightning.errors import CheckpointError, InvalidArgumentError, LowBitError
from lowbit_lightning.optim.forward_only import ForwardOnlyOptimizer
from lowbit_lightning.precision.four_bit import check_only_precision
from lowbit_lightning.run_summary import summary
from lowbit_lightning.spikes.trusted import find as find_trusted
from lowbit_lightning.strategies.forward_only import ForwardOnlyMixin

__all__ = ["LowBitCLI", "main", "run"]


class AtomicSaveConfig(SaveConfigCallback):
    """Saves ``config.yaml`` beside the logs like the stock callback, but whole or not at all.

    Without a logger that makes a folder for the run, that is the working folder, where a file of that name is the
    user's: it is then left alone.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder on every rank, because asking for it is a collective call, then save on rank zero."""
        self.log_dir = trainer.log_dir
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file. Called on rank zero only."""
        if self.log_dir is None:
            return
        target = Path(self.log_dir) / self.config_filename
        if target.exists() and target.parent.resolve() == Path(trainer.default_root_dir).resolve():
            rank_zero_info(f"{self.config_filename} exists and is left as it is: this run's settings are not saved.")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            file.write(self.parser.dump(self.config, skip_none=False).encode())


class LowBitCLI(LightningCLI):
    """A LightningCLI for any LightningModule and LightningDataModule, given by ``class_path``.

    Args:
        args: The command line; that of the process when None.
        run: Whether to run the verb, or only to instantiate ``model``, ``datamodule`` and ``trainer``.

    Raises:
        LowBitError: Anything the user can mend, see :mod:`lowbit_lightning.errors`.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            save_config_callback=AtomicSaveConfig,
            # Starting again in the same folder, as every resumed run does, is not an error; see AtomicSaveConfig.
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=ConfigParser,
            args=args,
            run=run,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``optimizer``, ``lr_scheduler``, ``scheduler_interval`` and ``no_decay``."""
        late: dict[str, Any] = {"instantiate": False, "required": False, "fail_untyped": False}
        parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"}, **late)
        parser.add_subclass_arguments(LRSchedulerTypeTuple, "lr_scheduler", skip={"optimizer"}, **late)
        parser.add_argument(
            "--scheduler_interval",
            type=Literal["step", "epoch"] | None,
            default=None,
            help="When the scheduler goes on; null: every step if it takes total_steps, else every epoch.",
        )
        parser.add_argument(
            "--no_decay",
            type=list[str],
            default=late_optimizer.NO_DECAY,
            help="Patterns of parameter names without weight decay, such as '*bias'; case does not matter.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with the names of shipped configurations resolved, and explain what does not parse."""
        if isinstance(args, dict | Namespace):
            super().parse_arguments(parser, args)
            return
        self.arguments = resolve_names(sys.argv[1:] if args is None else args)
        try:
            self.config = parser.parse_args(self.arguments)
        except ConfigProblem as problem:
            verb = next((word for word in self.arguments if word in self.subcommands()), None)
            raise explain(str(problem), self.arguments, self._parser(verb)) from problem

    def _parse_ckpt_path(self) -> None:
        """Look at ``--ckpt_path`` before Lightning does: its own message for a torn file is a traceback."""
        verb = self.config.get("subcommand")
        given = self.config[verb].get("ckpt_path") if verb else None
        if given is None or not checkpoints.is_local_file(given):
            super()._parse_ckpt_path()
            return
        trusted = self.config[verb].get("weights_only") is False
        checkpoints.check_readable(Path(given), weights_only=not trusted)
        try:
            super()._parse_ckpt_path()
        except (ConfigProblem, LowBitError) as problem:
            raise CheckpointError(
                f"--ckpt_path {str(given)!r} was saved with hyper-parameters that this configuration's model does not"
                f" take: {str(problem).strip()}"
            ) from problem
        except pickle.UnpicklingError:
            # Lightning reads saved hyper-parameters with weights_only=True whatever the user says; the user trusts
            # this file, and the model is then the one of the configuration.
            if not trusted:
                raise
        except (RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(
                f"--ckpt_path {str(given)!r} is torn: {error}. Use an older checkpoint, or start without --ckpt_path."
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; before it the late optimizer, with it the memory ledger and checkpoints that never tear."""
        if self.subcommand in (None, "fit"):
            late_optimizer.bind(
                self.model,
                _plain(self._get(self.config_init, "optimizer")),
                _plain(self._get(self.config_init, "lr_scheduler")),
                self._get(self.config_init, "scheduler_interval"),
                self._get(self.config_init, "no_decay"),
            )
            configured = self._get(self.config_init, "trainer")
            callbacks = configured["callbacks"] or []
            callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
            # Barebones means nothing but the loop, to measure it.
            if not configured["barebones"] and not any(isinstance(callback, MemoryLedger) for callback in callbacks):
                callbacks.append(MemoryLedger())
            kwargs["callbacks"] = _without_repetition(callbacks)
        asked = self._get(self.config_init, "trainer")
        if isinstance(asked["plugins"], list):
            kwargs["plugins"] = _without_repetition(asked["plugins"])
        check_only_precision(kwargs.get("plugins", asked["plugins"]), asked["precision"])
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand in (None, "fit"):
            self._check_forward_only(trainer)
        # Only where Lightning would use its default: other strategies and users bring their own.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = checkpoints.AtomicCheckpointIO()
        return trainer

    def _check_forward_only(self, trainer: Trainer) -> None:
        """Compare optimizer and strategy before weights go anywhere: gradients of a large model may not fit in memory.

        Raises:
            InvalidArgumentError: One of them needs gradients and the other makes none.
        """
        optimizer = _plain(self._get(self.config_init, "optimizer"))
        replaced = any(isinstance(callback, QuantizeOptimizerStates) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if optimizer is None or replaced:  # then the strategy looks at the optimizer when it is there
            return
        name, strategy = optimizer["class_path"], type(trainer.strategy).__name__
        needs_no_gradient = issubclass(late_optimizer.configured_class(optimizer), ForwardOnlyOptimizer)
        makes_none = isinstance(trainer.strategy, ForwardOnlyMixin)
        if needs_no_gradient and not makes_none:
            raise InvalidArgumentError(
                f"optimizer {name} takes no gradients, and strategy {strategy} would compute them: set trainer.strategy"
                " to forward_only, or forward_only_ddp for several devices."
            )
        if makes_none and not needs_no_gradient:
            raise InvalidArgumentError(
                f"optimizer {name} needs gradients, and strategy {strategy} computes none: set optimizer to"
                " lowbit_lightning.optim.FZOO or MeZO, or trainer.strategy to auto."
            )

    def before_fit(self) -> None:
        """Find what ``--ckpt_path last`` or ``trusted`` means and start the clock."""
        self._find_trusted_checkpoint()
        self._find_last_checkpoint()
        self.started = time.perf_counter()

    def before_validate(self) -> None:
        """Find what ``--ckpt_path`` means; here random weights are never what was asked for."""
        self._find_trusted_checkpoint()
        if not self._find_last_checkpoint():
            raise CheckpointError(
                "--ckpt_path last: there is no last.ckpt of an earlier run where this configuration's logger writes. "
                "Give the file, or run fit with ModelCheckpoint(save_last=True) first."
            )

    before_test = before_predict = before_validate

    def _find_last_checkpoint(self) -> bool:
        """Replace ``last`` by the newest file there is; False if there is none."""
        options = self.config_init[self.subcommand]
        if options["ckpt_path"] != "last" or checkpoints.has_own_folder(self.trainer):
            return True
        path = checkpoints.last_of_earlier_runs(self.trainer)
        if path is None:
            return False
        self._continue_from(path)
        return True

    def _find_trusted_checkpoint(self) -> None:
        """Replace ``trusted`` by the newest whole ``last-trusted.ckpt``."""
        if self.config_init[self.subcommand]["ckpt_path"] != "trusted":
            return
        path = find_trusted(self.trainer)
        if path is None:
            raise CheckpointError(
                "--ckpt_path trusted: there is no last-trusted.ckpt where this configuration's ModelCheckpoint or"
                " logger writes. SpikeGuard makes one of the checkpoints of a run, after snapshot.min_age healthy"
                " steps; for any other checkpoint use --ckpt_path last or give the file."
            )
        self._continue_from(path)

    def _continue_from(self, path: Path) -> None:
        options = self.config_init[self.subcommand]
        checkpoints.check_readable(path, weights_only=options["weights_only"] is not False)
        rank_zero_info(f"Continuing from {path}")
        options["ckpt_path"] = str(path)

    def after_fit(self) -> None:
        """Print the summary, once for all ranks."""
        if self.trainer.is_global_zero:
            print(summary(self.trainer, self.model, time.perf_counter() - self.started))


def run(arguments: list[str]) -> int:
    """``lowbit-lightning fit|validate|test|predict``.

    Raises:
        LowBitError: Anything the user can mend.
    """
    quieten_lightning()
    LowBitCLI(arguments)
    return 0


def quieten_lightning() -> None:
    """Drop what a user cannot act on: Lightning's advertisements, and a deprecation between the libraries."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    # Lightning uses a class that torch has deprecated; only Lightning can mend it.
    warnings.filterwarnings(
        "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
    )


def _without_repetition(parts: list[Any]) -> list[Any]:
    """Drop callbacks and plugins of ours that a later configuration brings again: overlays append, the last wins."""
    kept: list[Any] = []
    for position, part in enumerate(parts):
        ours = type(part).__module__.startswith("lowbit_lightning.")
        if ours and any(type(part) is type(later) for later in parts[position + 1 :]):
            rank_zero_info(f"{type(part).__name__} is configured more than once: the last one is used.")
        else:
            kept.append(part)
    return kept


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _plain(config: Namespace | dict[str, Any] | None) -> dict[str, Any] | None:
    """``class_path`` and ``init_args`` as plain dictionaries."""
    return config.as_dict() if isinstance(config, Namespace) else config
