"""All perturbed passes of a step in one, with rank-1 signs: the weights are read once for N of them.

The module's own ``training_step`` runs under ``torch.vmap`` over the perturbations, with nothing batched but sign
vectors; :mod:`.rank1_functions` lets every function that is handed a weight see it perturbed. Dropout masks are those
of the clean pass. It pays while a pass has few rows (tokens): the time goes into reading weights then. With many rows
arithmetic takes the time, which is not less in one pass, and activations are there N times.

The first batched step of a run is made one by one as well and its losses are compared. Where they differ, or a step
cannot be vmapped (control flow by values, ``.item()``, writing in place), passes are made one by one from then on, and
one message says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lowbit_lightning.kernels.rademacher import Copy, matrix_shape, perturbed_copies
from lowbit_lightning.optim.base import ParamGroup
from lowbit_lightning.optim.forward_only import Evaluation, ForwardOnlyOptimizer, scalar_loss
from lowbit_lightning.strategies.rank1_functions import Rank1, Rank1Functions

# Rows of a pass up to which one pass for all perturbations is faster: CPU, Llama of 20M parameters, N = 8.
_FEW_ROWS = 128

Replay = Callable[[Callable[[Callable[[], Any]], Tensor]], Tensor]


class BatchedPasses:
    """Decides whether a step's perturbed passes are made at once, and makes them.

    Args:
        module: the LightningModule.
        optimizer: says which parameters are perturbed, and how.
    """

    def __init__(self, module: nn.Module, optimizer: ForwardOnlyOptimizer) -> None:
        self._module = module
        self._optimizer = optimizer
        self._is_possible = True
        self._is_checked = False
        self._has_said = False
        self._coarsest = torch.float32

    def describe(self) -> str:
        """Return how the passes are made, for the table at the start of a run."""
        if self._optimizer.perturbation != "rank1" or self._optimizer.execution == "sequential":
            return "one after another"
        return "all in one where possible" + (
            f", up to {_FEW_ROWS} tokens" if self._optimizer.execution == "auto" else ""
        )

    def are_wanted(self, evaluations: Sequence[Evaluation], batch: Any) -> bool:
        """Return whether to make these evaluations of a batch, a collection of tensors, at once."""
        is_rank1 = self._optimizer.perturbation == "rank1"
        if not (is_rank1 and self._is_possible) or self._optimizer.execution == "sequential" or len(evaluations) < 2:
            return False
        rows = _rows(batch)
        if self._optimizer.execution == "auto" and rows > _FEW_ROWS:
            self._say(f"one after another: a batch has {rows} tokens, and up to {_FEW_ROWS} it is faster in one")
            return False
        return True

    def losses(
        self, evaluations: Sequence[Evaluation], replay: Replay, one_by_one: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """Return the loss of each evaluation, 0-d fp32.

        Args:
            evaluations: at perturbed weights.
            replay: calls what it is given with the training step, ready to be repeated.
            one_by_one: makes the same evaluations sequentially.
        """
        batched = self._attempt(evaluations, replay)
        if batched is None:
            return one_by_one()
        if not self._is_checked:
            sequential = torch.stack(one_by_one())
            if not sequential.isfinite().all():
                return list(sequential.unbind())  # nothing to compare; the next step will tell
            difference = float((sequential - batched).abs().max())
            if not difference <= _tolerance(sequential, self._coarsest):
                self._give_up(f"batched losses differ from theirs by {difference:.3g}")
                return list(sequential.unbind())
            self._is_checked = True
            self._say(f"all {len(evaluations)} in one")
        return list(batched.unbind())

    def _attempt(self, evaluations: Sequence[Evaluation], replay: Replay) -> Tensor | None:
        try:
            return replay(partial(self._at_once, evaluations))
        except Exception as error:  # whatever vmap cannot do, and it has many ways of saying so
            self._give_up(_explanation(self._module, error))
            return None

    def _at_once(self, evaluations: Sequence[Evaluation], training_step: Callable[[], Any]) -> Tensor:
        entries = list(self._optimizer.trainable())
        largest = max(param.numel() for param in self._module.parameters())

        def one_pass(varying: dict[int, tuple[Tensor, ...]]) -> Tensor:
            matrices, vectors = {}, {}
            for group, name, param in entries:
                key, values = id(param), varying[id(param)]
                if param.ndim > 1:
                    may_copy = len(evaluations) * param.numel() <= largest
                    r, s = values
                    matrices[key] = Rank1(name, param, r, s, group["eps"], may_copy)
                else:
                    vectors[key] = values[0]
            with Rank1Functions(matrices, vectors) as functions:
                loss = scalar_loss(training_step())
            self._coarsest = functions.coarsest
            return loss

        varying: dict[int, tuple[Tensor, ...]] = {}
        copies: list[Copy] = []
        for entry in entries:
            varying[id(entry[2])] = self._varying(*entry, evaluations, copies)
        with torch.no_grad():
            perturbed_copies(copies)
        return torch.vmap(one_pass, randomness="same")(varying)

    def _varying(
        self, group: ParamGroup, name: str, param: Tensor, evaluations: Sequence[Evaluation], copies: list[Copy]
    ) -> tuple[Tensor, ...]:
        """Return room for what differs from pass to pass, first dimension N, and add to ``copies`` what goes there.

        A matrix's are its signs r and s, a vector's are its perturbed copies.
        """
        noise = self._optimizer.noise(group, name, param)
        if param.ndim < 2:
            room = param.new_empty(len(evaluations), *param.shape)
            copies += (
                Copy(param, evaluation.sign * group["eps"], noise, evaluation.index, out)
                for evaluation, out in zip(evaluations, room.unbind(), strict=True)
            )
            return (room,)
        rows, columns = matrix_shape(param)
        # Signs are what a perturbation makes of zeros: fast where the kernel is.
        zeros = torch.zeros(columns + rows, device=param.device)
        signs, noise = zeros.new_empty(len(evaluations), columns + rows), replace(noise, rank1=False)
        copies += (
            Copy(zeros, evaluation.sign, noise, evaluation.index, out)
            for evaluation, out in zip(evaluations, signs.unbind(), strict=True)
        )
        return signs[:, columns:], signs[:, :columns]

    def _say(self, choice: str) -> None:
        if self._optimizer.execution == "auto" and not self._has_said:
            self._has_said = True
            rank_zero_info(f"{type(self._optimizer).__name__}: execution=auto makes the perturbed passes {choice}.")

    def _give_up(self, reason: str) -> None:
        self._is_possible, self._has_said = False, True
        execution = self._optimizer.execution
        say = rank_zero_info if execution == "auto" else rank_zero_warn
        say(
            f"{type(self._optimizer).__name__}: execution={execution} makes the perturbed passes one after another, "
            f"because {reason}"
        )


def _rows(batch: Any) -> int:
    """Return the number of tokens of a batch, or of other vectors that layers see: of its largest tensor."""
    rows = [0]
    apply_to_collection(
        batch, Tensor, lambda t: rows.append(t.shape[:-1].numel() if t.is_floating_point() and t.ndim else t.numel())
    )
    return max(rows)


def _tolerance(losses: Tensor, dtype: torch.dtype) -> float:
    """Return how far the losses of two ways of computing in ``dtype`` may differ that see the same weights."""
    resolution = torch.finfo(dtype).eps
    if losses.is_cuda and torch.get_float32_matmul_precision() != "highest":
        resolution = max(resolution, 2.0**-10)
    spread = float(losses.max() - losses.min())
    return 0.01 * spread + 128 * resolution * float(losses.abs().max())


def _explanation(module: nn.Module, error: Exception) -> str:
    """Return the first sentence of an error, with the innermost module in whose code it arose."""
    names = {id(part): name for name, part in module.named_modules()}
    where, traceback = type(module).__name__, error.__traceback__
    while traceback is not None:
        part = traceback.tb_frame.f_locals.get("self")
        if isinstance(part, nn.Module) and names.get(id(part)):
            where = f"{names[id(part)]} ({type(part).__name__})"
        traceback = traceback.tb_next
    text = str(error).split("\n")[0].split(". ")[0]
    return f"{where} cannot be batched: {text}"
