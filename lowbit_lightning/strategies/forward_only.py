"""Strategies that train with forward passes only: for FZOO and MeZO, at the memory of inference.

The closure of Lightning's automatic optimization runs once, so that everything is logged and counted once, at the loss
of the first evaluation. Where it would call ``backward``, the same batch is evaluated at the other weights that the
optimizer asks for, one after another (:mod:`.just_in_time`) or, with rank-1 signs and few tokens, all in one pass
(:mod:`.batched`), with logging off and every trace removed (:mod:`.replay`). No graph is built, no gradient exists,
the weights are written in one place only: the optimizer's step.

Order of hooks in one step: training_step, on_before_zero_grad, on_before_backward(loss), the other evaluations,
on_after_backward, on_before_optimizer_step (where a guard may call ``optimizer.skip_next_update()``), the update. With
``accumulate_grad_batches`` every micro-batch is evaluated under the same perturbations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim.forward_only import Evaluation, ForwardOnlyOptimizer, scalar_loss
from lowbit_lightning.strategies.batched import BatchedPasses
from lowbit_lightning.strategies.just_in_time import JustInTime
from lowbit_lightning.strategies.replay import Batch, ModuleState, silent


class ForwardOnlyMixin(Strategy):
    """Replaces a strategy's training step, backward and optimizer step."""

    _step: "_Step | None" = None

    def setup(self, trainer: Trainer) -> None:
        """Check that the Trainer asks for nothing that needs a gradient."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer)
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizer and check that it can do without gradients."""
        super().setup_optimizers(trainer)
        optimizer = self.optimizers[0] if self.optimizers else None
        if not isinstance(optimizer, ForwardOnlyOptimizer):
            raise InvalidArgumentError(
                f"the optimizer is {type(optimizer).__name__}, which needs gradients; {type(self).__name__} computes "
                "none: set optimizer to lowbit_lightning.optim.FZOO or MeZO, or remove the strategy"
            )
        if next(optimizer.trainable(), None) is None:
            raise InvalidArgumentError("every parameter of the optimizer is frozen: there is nothing to optimize")
        assert self.lightning_module is not None
        self._step = _Step(self.lightning_module, optimizer, self._agree)

    def _check(self, trainer: Trainer) -> None:
        module, name = self.lightning_module, type(self).__name__
        assert module is not None
        if not module.automatic_optimization:
            raise InvalidArgumentError(
                f"{type(module).__name__} has automatic_optimization=False: {name} makes the optimization step itself"
            )
        if trainer.gradient_clip_val:
            raise InvalidArgumentError(
                f"gradient_clip_val={trainer.gradient_clip_val} with {name}: there is no gradient to clip, and FZOO's "
                "steps are normalized already. Set gradient_clip_val to null"
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise InvalidArgumentError(
                f"precision=16-mixed with {name}: there is no gradient to scale. Use bf16-mixed, bf16-true, 16-true "
                "or 32-true"
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise InvalidArgumentError(
                f"{type(module).__name__}.training_step takes dataloader_iter: {name} needs the batch itself, to "
                "repeat the step on it"
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make the first evaluation, whose loss is the one that is logged."""
        assert self._step is not None
        return self._step.first(super().training_step, Batch(args, kwargs))

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Make the other evaluations where gradients would be computed; the hooks around fire as ever."""
        assert self.lightning_module is not None
        assert self._step is not None
        self.pre_backward(closure_loss)
        loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self._step.others(self.lightning_module.trainer.accumulate_grad_batches)
        loss = self.precision_plugin.post_backward(loss, self.lightning_module)
        self.post_backward(loss)
        return loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the closure once, let callbacks look, then make the update from the collected losses."""
        module = self.lightning_module
        assert module is not None
        assert isinstance(optimizer, ForwardOnlyOptimizer)
        loss = closure()
        # What the precision plugin does between its closure and its step. Its optimizer_step would do this as well, but
        # hand callbacks whatever object stands between it and the real optimizer's step.
        self.precision_plugin._after_closure(module, optimizer)
        if optimizer.is_ready:  # not after a training_step that returned None
            gradient_norm = optimizer.gradient_norm()
            optimizer.step(**kwargs)
            self._log(module, optimizer, gradient_norm)
            self._after_update(optimizer)
        return loss

    def _log(self, module: LightningModule, optimizer: ForwardOnlyOptimizer, gradient_norm: float) -> None:
        if not module.trainer.barebones:
            stem, clock = type(optimizer).__name__.lower(), optimizer.param_groups[0]
            skips = clock["nonfinite_skips"] + clock["flat_skips"]
            module.log_dict({f"{stem}/gradient_norm": gradient_norm, f"{stem}/skipped_updates": float(skips)})

    def _agree(self, losses: Tensor, used: Sequence[bool], changed: Sequence[bool]) -> tuple[Tensor, Sequence[bool]]:
        """Return the losses over all processes, and which parameters took part in any of them.

        Args:
            losses: fp32, one for each evaluation.
            used: for each parameter of the optimizer.
            changed: for each buffer of the module, whether the training step writes it.
        """
        return losses, used

    def _after_update(self, optimizer: ForwardOnlyOptimizer) -> None:
        """What processes do together after an update."""

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return one row: how the forward passes are made."""
        if self._step is None:
            return []
        return [("forward-only", "every step", f"passes {self._step.describe()}, weights untouched until the update")]

    def teardown(self) -> None:
        """Let go of the scratch memory."""
        self._step = None
        super().teardown()


class _Step:
    """The evaluations of one step, micro-batch by micro-batch."""

    def __init__(self, module: LightningModule, optimizer: ForwardOnlyOptimizer, agree: Callable[..., Any]) -> None:
        self._module = module
        self._optimizer = optimizer
        self._agree = agree
        self._just_in_time = JustInTime(module, optimizer)
        self._batched = BatchedPasses(module, optimizer)
        self._changing: set[str] = set()

    def describe(self) -> str:
        """Return how the perturbed passes are made."""
        return self._batched.describe()

    def first(self, training_step: Callable[..., Any], batch: Batch) -> Any:
        """Make the first evaluation; returns what the training step returns."""
        self._training_step, self._batch = training_step, batch
        evaluation, *self._to_do = self._optimizer.evaluations()
        self._before = ModuleState(self._module, self._changing)
        output, watch = self._evaluate(evaluation, watch=True)
        self._changing |= self._before.changed_buffers()
        batch.check_unchanged()
        self._losses: list[Tensor] = []
        if output is None:
            self._to_do = []
        else:
            self._losses = [scalar_loss(output)]
            self._used = watch.used()
            if not watch.is_complete:  # once in a run, where a parameter is found outside its own module
                self._losses, self._to_do = [], [evaluation, *self._to_do]
            self._warn_of_coarse_losses(output)
        return output

    def others(self, micro_batches: int) -> None:
        """Make the other evaluations and hand the losses to the optimizer."""
        after = ModuleState(self._module, self._changing)
        try:
            if self._batched.are_wanted(self._to_do, self._batch.copy()):
                self._losses += self._batched.losses(self._to_do, self._replay, self._one_by_one)
            else:
                self._losses += self._one_by_one()
        finally:
            after.restore()
        params = [param for _, _, param in self._optimizer.named_params()]
        used = {id(param) for param in self._used}
        changed = [name in self._changing for name, _ in self._module.named_buffers(remove_duplicate=False)]
        losses = torch.stack(self._losses) / micro_batches
        losses, flags = self._agree(losses, [id(param) in used for param in params], changed)
        chosen = [param for param, flag in zip(params, flags, strict=True) if flag]
        self._optimizer.accumulate(losses.tolist(), chosen)

    def _one_by_one(self) -> list[Tensor]:
        passes = [partial(self._just_in_time.run, evaluation) for evaluation in self._to_do]
        return [scalar_loss(self._replay(one)[0]) for one in passes]

    def _replay(self, run: Callable[[Callable[[], Any]], Any]) -> Any:
        """Return what ``run`` makes of the training step, repeated so that nobody notices."""
        self._before.restore()
        args, kwargs = self._batch.copy()
        with silent(self._module), torch.no_grad():
            return run(partial(self._training_step, *args, **kwargs))

    def _evaluate(self, evaluation: Evaluation, watch: bool = False) -> tuple[Any, Any]:
        args, kwargs = self._batch.copy()
        with torch.no_grad():
            return self._just_in_time.run(evaluation, partial(self._training_step, *args, **kwargs), watch=watch)

    def _warn_of_coarse_losses(self, output: Any) -> None:
        loss = output["loss"] if isinstance(output, dict) else output
        if loss.dtype in (torch.bfloat16, torch.float16) and self._optimizer.param_groups[0]["step"] == 0:
            rank_zero_warn(
                f"training_step returns a {loss.dtype} loss: its differences, all that forward-only training learns "
                "from, are mostly rounded away. Compute the loss from logits.float()"
            )


class ForwardOnlyStrategy(ForwardOnlyMixin, SingleDeviceStrategy):
    """Train on one device with forward passes only, at the memory of inference plus the largest parameter.

    For ``lowbit_lightning.optim.FZOO`` and ``MeZO``. The device is the Trainer's; any LightningModule with automatic
    optimization works unchanged, also with PEFT adapters or a quantized frozen base: what requires a gradient moves.

    Raises:
        InvalidArgumentError: at the start of fit, for an optimizer or a Trainer setting that needs gradients, or
            several devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self._devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices that the Trainer chose, through which it sets the one to use."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise InvalidArgumentError(
                f"devices={len(devices)} with ForwardOnlyStrategy: one device. For several set strategy to "
                "lowbit_lightning.strategies.ForwardOnlyDDPStrategy"
            )
        self._devices = devices
        if devices:
            self._root_device = devices[0]


class ForwardOnlyDDPStrategy(ForwardOnlyMixin, DDPStrategy):
    """Train data-parallel with forward passes only: processes exchange N + 2 numbers a step instead of gradients.

    For ``lowbit_lightning.optim.FZOO`` and ``MeZO``. Every process evaluates its own batch under the same
    perturbations, which it computes itself; losses are averaged and every process makes the same update. There is no
    DDP wrapper and no gradient bucket. Buffers that the training step writes are process 0's after every step.

    Args:
        digest_every_n_steps: steps between two comparisons of all parameters over all processes, which end the run
            if a process has drifted away; 0 for never.

    Raises:
        InvalidArgumentError: at the start of fit, for an optimizer or a Trainer setting that needs gradients.
    """

    def __init__(self, digest_every_n_steps: int = 100) -> None:
        if digest_every_n_steps < 0:
            raise InvalidArgumentError(f"digest_every_n_steps={digest_every_n_steps} is out of range: an integer >= 0")
        super().__init__()
        self.digest_every_n_steps = digest_every_n_steps
        self._flags: list[bool] | None = None  # this process's, as the others know them
        self._agreed: list[bool] = []

    def configure_ddp(self) -> None:
        """Start all processes from process 0's weights and buffers, which is all of DDP that is needed."""
        assert self.lightning_module is not None
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            dist.broadcast(tensor.data, 0)
        self._flags, self._agreed = None, []

    def _agree(self, losses: Tensor, used: Sequence[bool], changed: Sequence[bool]) -> tuple[Tensor, Sequence[bool]]:
        flags = [*used, *changed]
        news = torch.tensor([float(flags != self._flags)], device=self.root_device)
        message = torch.cat([losses.to(self.root_device), news])
        dist.all_reduce(message)
        message /= self.world_size
        dist.broadcast(message, 0)  # a sum may differ in its last bit from one process to another
        *averaged, is_new = message.unbind()
        if float(is_new):
            # Which experts a batch is routed to may differ, and move all the same: what one process used, all move.
            union = torch.tensor(flags, dtype=torch.uint8, device=self.root_device)
            dist.all_reduce(union, dist.ReduceOp.MAX)
            self._flags, self._agreed = flags, union.bool().tolist()
        return torch.stack(averaged), self._agreed[: len(used)]

    def _after_update(self, optimizer: ForwardOnlyOptimizer) -> None:
        assert self.lightning_module is not None
        buffers = [buffer for _, buffer in self.lightning_module.named_buffers(remove_duplicate=False)]
        for buffer, changes in zip(buffers, self._agreed[-len(buffers) :] if buffers else (), strict=True):
            if changes:
                dist.broadcast(buffer, 0)
        every = self.digest_every_n_steps
        if every and optimizer.param_groups[0]["step"] % every == 0:
            self._compare_digests(optimizer)

    def _compare_digests(self, optimizer: ForwardOnlyOptimizer) -> None:
        named = [(name, param) for _, name, param in optimizer.named_params()]
        own = torch.stack([_digest(param) for _, param in named]).to(self.root_device)
        digests = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(digests, own)
        for rank, digest in enumerate(digests):
            different = (digest != digests[0]).nonzero()
            if different.numel():
                raise RuntimeError(
                    f"parameter {named[int(different[0])][0]!r} differs between process 0 and process {rank} after "
                    f"step {optimizer.param_groups[0]['step']}: something outside the optimizer changed it, or the "
                    "devices compute differently. Resume from the last checkpoint"
                )


def _digest(param: Tensor) -> Tensor:
    """Return the sum of a parameter's words as an int64, which one changed bit changes."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[param.element_size()]
    return param.detach().reshape(-1).view(words).sum(dtype=torch.int64)


StrategyRegistry.register("forward_only", ForwardOnlyStrategy, description="forward passes only, on one device")
StrategyRegistry.register("forward_only_ddp", ForwardOnlyDDPStrategy, description="forward passes only, data-parallel")
