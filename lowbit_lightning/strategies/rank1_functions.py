"""Torch functions at N rank-1 perturbed weights at a time, for which no perturbed weight is ever made.

With signs ``U = r sᵀ`` a perturbed linear layer is ``x (W + ε U)ᵀ = x Wᵀ + ε (x·s) r``: the expensive product reads W
once for all N perturbations, what differs between them are two vectors. The same holds for embeddings, ``x W``
(Conv1D) and convolutions. It is the function that is intercepted, by the identity of the weight handed to it, and not a
list of layer classes, so that anybody's layer will do. Vectors (norm weights, biases) and small matrices in other uses
are simply there N times. What is left is an error: then passes are made one by one.

Runs inside ``torch.vmap`` over the perturbations. Scaled dot-product attention has no batching rule and would be
looped over; it is spelled out here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class NotBatchableError(RuntimeError):
    """A step cannot be made at N perturbed weights at a time; the message says what stands in the way."""


@dataclass(frozen=True, slots=True)
class Rank1:
    """A weight W and the signs ``r sᵀ`` of its perturbation; in ``torch.vmap``, of all perturbations.

    Attributes:
        name: of the parameter.
        weight: W, seen as (rows, columns) = (shape[0], -1).
        r: (rows,) fp32 ±1.
        s: (columns,) fp32 ±1.
        eps: ε.
        may_copy: whether N perturbed copies of it may be made.
    """

    name: str
    weight: Tensor
    r: Tensor
    s: Tensor
    eps: float
    may_copy: bool

    def add(self, output: Tensor, factor: Tensor, vector: Tensor) -> Tensor:
        """Return ``output + ε factor · vector`` in the dtype of ``output``; shapes broadcast."""
        return torch.addcmul(output, factor.to(output.dtype), vector.to(output.dtype), value=self.eps)

    def seen_as(self, result: Any) -> "Rank1 | None":
        """Return the same for a view of all of the weight, transposed or not; None for anything else."""
        weight = self.weight
        whole = weight if weight._base is None else weight._base
        if not isinstance(result, Tensor) or result.dtype != weight.dtype:
            return None
        if result is not whole and result._base is not whole:
            return None
        if (result.shape, result.stride()) == (weight.shape, weight.stride()):
            return replace(self, weight=result)
        if weight.ndim == 2 and (result.shape, result.stride()) == (weight.shape[::-1], weight.stride()[::-1]):
            return replace(self, weight=result, r=self.s, s=self.r)
        return None

    def copy(self) -> Tensor:
        """Return ``W + ε r sᵀ``."""
        weight = _at_least_fp32(self.weight).reshape(self.weight.shape[0], -1)
        return self.add(weight, self.r[:, None], self.s).view(self.weight.shape).to(self.weight.dtype)


class Rank1Functions(TorchFunctionMode):
    """Makes torch functions see perturbed parameters where they are handed the parameters themselves.

    Args:
        matrices: the perturbed parameters of two or more dimensions, by id.
        vectors: what takes the place of the others, by id.

    Attributes:
        coarsest: the dtype of least precision in which a perturbed layer computed.
    """

    def __init__(self, matrices: Mapping[int, Rank1], vectors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._matrices = dict(matrices)
        self._replaced = dict(vectors)
        self.coarsest = torch.float32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._replace(args), self._replace(kwargs) if kwargs else {}
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        found = self._find(args, []) if not kwargs else self._find(kwargs.values(), self._find(args, []))
        if not found:
            return func(*args, **kwargs)
        rule = _RULES.get(func)
        result = rule(found[0], *args, **kwargs) if rule is not None and len(found) == 1 else None
        if result is not None:
            if torch.finfo(result.dtype).eps > torch.finfo(self.coarsest).eps:
                self.coarsest = result.dtype
            return result
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in _leaves(result)):
            return result  # a question about shape or dtype
        if (view := found[0].seen_as(result)) is not None:
            self._matrices[id(result)] = view
            return result
        for matrix in found:
            if not matrix.may_copy:
                name = getattr(func, "__name__", str(func))
                raise NotBatchableError(f"parameter {matrix.name!r} goes into {name}(), for which there is no rule")
            self._replaced[id(matrix.weight)] = matrix.copy()
        return func(*self._replace(args), **self._replace(kwargs))

    # These two look at every argument of every function, hundreds of times a pass.

    def _find(self, values: Iterable[Any], found: list[Rank1]) -> list[Rank1]:
        for value in values:
            if isinstance(value, tuple | list | dict):
                self._find(value.values() if isinstance(value, dict) else value, found)
            elif (matrix := self._matrices.get(id(value))) is not None:
                found.append(matrix)
        return found

    def _replace(self, value: Any) -> Any:
        kind = type(value)
        if kind is tuple or kind is list:
            return kind([self._replace(item) for item in value])
        if kind is dict:
            return {key: self._replace(item) for key, item in value.items()}
        return self._replaced.get(id(value), value)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


# ---- one rule for each function; None where it does not apply -------------------------------------------------------


def _linear(matrix: Rank1, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight is not matrix.weight:
        return None
    along = input @ matrix.s.to(input.dtype)
    output = functional.linear(input, weight)
    if bias is not None:  # by itself: with a batched bias vmap takes linear() apart before autocast sees it
        output = output + bias.to(output.dtype)
    return matrix.add(output, along.unsqueeze(-1), matrix.r)


def _product(matrix: Rank1, input: Tensor, other: Tensor) -> Tensor | None:
    if other is not matrix.weight or other.ndim != 2:
        return None
    along = input @ matrix.r.to(input.dtype)
    return matrix.add(input @ other, along.unsqueeze(-1), matrix.s)


def _addmm(matrix: Rank1, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if mat2 is not matrix.weight or alpha != 1:
        return None
    along = mat1 @ matrix.r.to(mat1.dtype)
    return matrix.add(torch.addmm(input, mat1, mat2, beta=beta), along.unsqueeze(-1), matrix.s)


def _embedding(
    matrix: Rank1,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Tensor | None:
    if weight is not matrix.weight or max_norm is not None:
        return None
    rows = functional.embedding(input, weight)
    return matrix.add(_at_least_fp32(rows), matrix.r[input].unsqueeze(-1), matrix.s).to(rows.dtype)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def rule(
        matrix: Rank1,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if weight is not matrix.weight or groups != 1:
            return None
        one = matrix.s.to(input.dtype).view(1, *weight.shape[1:])
        along = function(input, one, None, stride, padding, dilation)
        output = function(input, weight, None, stride, padding, dilation)
        channels = (-1, *[1] * (weight.ndim - 2))
        if bias is not None:
            output = output + bias.to(output.dtype).view(channels)
        return matrix.add(output, along, matrix.r.view(channels))

    return rule


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    torch.addmm: _addmm,
    torch.mm: _product,
    torch.matmul: _product,
    Tensor.mm: _product,
    Tensor.matmul: _product,
    Tensor.__matmul__: _product,
    functional.conv1d: _convolution(functional.conv1d),
    functional.conv2d: _convolution(functional.conv2d),
    functional.conv3d: _convolution(functional.conv3d),
}


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` is documented to compute, with the same dropout mask on CPUs."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    elif attn_mask is None:
        weights = scores.softmax(-1)
    elif attn_mask.dtype == torch.bool:
        hidden = ~attn_mask
        # The second fill is for rows that are hidden altogether.
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    else:
        weights = (scores + attn_mask).softmax(-1)
    return functional.dropout(weights, dropout_p) @ value if dropout_p else weights @ value
