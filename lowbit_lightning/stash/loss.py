"""The loss of a language model whose head is a linear layer, which keeps hidden states and no logits.

Logits are larger than all else where the vocabulary is large, and autograd keeps their log-softmax in fp32. Here they
are computed again in backward from the packed hidden states, some rows at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, pad

from lowbit_lightning.stash.autocast import Autocast
from lowbit_lightning.stash.forwards import PatchedForward
from lowbit_lightning.stash.kept import Kept
from lowbit_lightning.stash.redirect import plain
from lowbit_lightning.stash.stash import Stash

_LOGITS_AT_A_TIME = 1 << 22


class StashedCrossEntropy(torch.autograd.Function):
    """Σ of the cross entropies of ``logits = x Wᵀ + b``; x is all that is kept, packed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        stash: Stash,
        name: str,
    ) -> Tensor:
        """Compute.

        Args:
            ctx: of autograd.
            x: hidden states (rows, width).
            weight: (vocabulary, width).
            bias: (vocabulary,) or None.
            logits: (rows, vocabulary), what the head has made of x; without a gradient.
            targets: (rows,) int64.
            ignore_index: rows with this target do not count.
            stash: keeps x.
            name: of the loss.

        Returns:
            0-d fp32, in nats.
        """
        if stash.meter.measuring:
            stash.meter.run("loss", lambda y: cross_entropy(y.float(), targets, reduction="sum"), _leaf(logits))
        parts = [
            cross_entropy(logits[rows].float(), targets[rows], ignore_index=ignore_index, reduction="sum")
            for rows in _row_slices(logits)
        ]
        kept = stash.keep(x, "loss", name)
        ctx.save_for_backward(weight, bias, targets, *kept.tensors)
        ctx.rule, ctx.stash, ctx.ignore_index = kept.restore, stash, ignore_index
        ctx.autocast, ctx.x_dtype = Autocast.now(x.device), x.dtype
        return torch.stack(parts).sum() if parts else logits.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        weight, bias, targets, *tensors = ctx.saved_tensors
        dtype = ctx.autocast.dtype or ctx.x_dtype
        x = ctx.stash.restore(Kept(tuple(tensors), ctx.rule), dtype)
        x = x.reshape(-1, x.shape[-1])
        matrix, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x) if wants_x else None
        # Sums over rows stay in fp32 from one chunk to the next.
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if wants_weight else None
        db = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device) if wants_bias else None
        for rows in _row_slices(x, weight.shape[0]):
            counted = (targets[rows] != ctx.ignore_index)[:, None]
            dy = linear(x[rows], matrix, shift).float().softmax(-1)
            index = targets[rows].clamp_min(0)[:, None]
            dy.scatter_add_(1, index, -torch.ones_like(index, dtype=dy.dtype))
            dy = (dy * (counted * gradient)).to(dtype)
            if dx is not None:
                torch.mm(dy, matrix, out=dx[rows])
            if dw is not None:
                dw += dy.T @ x[rows]
            if db is not None:
                db += dy.sum(0, dtype=torch.float32)
        return (
            None if dx is None else dx.to(ctx.x_dtype),
            None if dw is None else dw.to(weight.dtype),
            None if db is None else db.to(bias.dtype),
            *(None,) * 5,
        )


class HeadForward(PatchedForward):
    """The linear layer that makes logits, which take along what they were made of."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        logits = self.original(*args, **kwargs)
        if len(args) == 1:
            setattr(logits, _SOURCE, (args[0], (args[0]._version, logits._version)))
        return logits


_SOURCE = "_lowbit_lightning_hidden_states"


class CausalLoss:
    """In place of Hugging Face's ``ForCausalLMLoss`` on a model; the original where the logits are not the head's own.

    Args:
        original: that loss.
        head: the layer that makes its logits.
        stash: keeps hidden states.
        name: of the loss.
    """

    def __init__(self, original: Callable[..., Tensor], head: nn.Module, stash: Stash, name: str) -> None:
        self.original, self.stash, self.name = original, stash, name
        self.head: Any = head

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the mean cross entropy of the next tokens, or their sum over ``num_items_in_batch``.

        Args:
            logits: (batch, length, vocabulary).
            labels: (batch, length) int64.
            vocab_size: the vocabulary.
            num_items_in_batch: to divide by, if given.
            ignore_index: label of tokens that do not count.
            shift_labels: labels, already moved by one token.
            kwargs: of the original.
        """
        source: tuple[Any, Any] = getattr(logits, _SOURCE, (None, None)) if torch.is_grad_enabled() else (None, None)
        x, versions = source
        weight, bias = self.head.weight, self.head.bias
        changed = x is None or versions != (x._version, logits._version)
        if changed or not plain(x, weight, bias) or logits.shape[-1] != vocab_size:
            return self.original(
                logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index, shift_labels=shift_labels, **kwargs,
            )  # fmt: skip
        targets = pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        targets = targets.reshape(-1).to(logits.device)
        total: Tensor = StashedCrossEntropy.apply(
            x.flatten(0, -2), weight, bias, logits.detach().flatten(0, -2), targets, ignore_index, self.stash, self.name
        )
        if num_items_in_batch is None:
            return total / (targets != ignore_index).sum()
        return total / (
            num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
        )


def is_causal_loss(loss: object) -> bool:
    """Whether a model's loss is the one that :class:`CausalLoss` stands in for."""
    return getattr(loss, "__name__", "") == "ForCausalLMLoss" and str(getattr(loss, "__module__", "")).startswith(
        "transformers."
    )


def _row_slices(x: Tensor, columns: int | None = None) -> Iterator[slice]:
    rows = max(1, _LOGITS_AT_A_TIME // (columns or x.shape[-1]))
    return (slice(start, start + rows) for start in range(0, x.shape[0], rows))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
