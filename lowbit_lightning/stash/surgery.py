"""Which modules get which forward, put on instances and taken off again; parameters and classes are never touched."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.stash.forwards import (
    ActivationForward,
    ConvolutionForward,
    DropoutForward,
    ExemptForward,
    LinearForward,
    NormForward,
    PatchedForward,
    RedirectedForward,
    ReLUForward,
    is_conv1d,
    shards_itself,
)
from lowbit_lightning.stash.loss import CausalLoss, HeadForward, is_causal_loss
from lowbit_lightning.stash.precision import KINDS, Kind
from lowbit_lightning.stash.stash import Stash

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_ACTIVATIONS = (nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.LogSigmoid)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS_OF_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

LinearFactory = Callable[[nn.Module, str, Stash], PatchedForward]


class Patches:
    """The forwards that were put on a model.

    Attributes:
        counts: how many modules of each kind were.
    """

    def __init__(self) -> None:
        self.counts: Counter[Kind] = Counter()
        self._undo: list[Callable[[], None]] = []

    def put(self, forward: PatchedForward) -> None:
        """Put one on its module."""
        module = forward.module
        had_own = "forward" in vars(module)
        before = forward.original
        module.forward = forward  # type: ignore[method-assign, assignment]

        def undo() -> None:
            if had_own:
                module.forward = before  # type: ignore[method-assign]
            else:
                vars(module).pop("forward", None)

        self._undo.append(undo)

    def put_loss(self, model: Any, loss: CausalLoss) -> None:
        """Give a Hugging Face model a loss of its own, as its ``loss_function`` can be set."""
        had_own, before = "_loss_function" in vars(model), vars(model).get("_loss_function")
        model._loss_function = loss

        def undo() -> None:
            if had_own:
                model._loss_function = before
            else:
                vars(model).pop("_loss_function", None)

        self._undo.append(undo)

    def remove(self) -> None:
        """Take them all off again."""
        while self._undo:
            self._undo.pop()()


def patch(
    root: nn.Module,
    stash: Stash,
    include: Sequence[str] = KINDS,
    exclude: Sequence[str] = (),
    linear: LinearFactory = LinearForward,
) -> Patches:
    """Make the modules within a model keep packed what they keep for backward.

    Args:
        root: the model. Its own forward stays; those of all modules within are replaced, on the instances.
        stash: keeps.
        include: kinds of tensors, and patterns for names or classes of modules; with patterns, only modules that match
            one, and what is within them.
        exclude: likewise, what is left alone.
        linear: makes the forward of a linear layer.

    Raises:
        InvalidArgumentError: a kind or pattern that matches nothing.
    """
    chosen = _Chosen(root, include, exclude)
    if "other" not in chosen.kinds and not any(packs and kind is not None for _, _, kind, packs in chosen):
        found = ", ".join(sorted({kind for _, _, kind, _ in chosen if kind is not None})) or "none"
        raise InvalidArgumentError(
            f"include={list(include)!r}, exclude={list(exclude)!r} leave nothing to pack in {type(root).__name__}: "
            f"the kinds of its modules are {found}"
        )
    stash.exempt = bool(chosen.only) or "other" not in chosen.kinds
    patches = Patches()
    for name, module, kind, packs in chosen:
        if packs:
            patches.put(_forward(module, name, stash, kind, chosen.kinds, linear))
            if kind is not None:
                patches.counts[kind] += 1
        elif kind is not None or chosen.is_excluded(name):
            patches.put(ExemptForward(module, name, stash))
    if "loss" in chosen.kinds:
        for name, model in chosen.modules:
            _patch_loss(model, name, stash, patches)
    return patches


def kinds_in(root: nn.Module, include: Sequence[str] = KINDS, exclude: Sequence[str] = ()) -> Counter[Kind]:
    """Return how many modules of each kind :func:`patch` would patch."""
    found = Counter(kind for _, _, kind, packs in _Chosen(root, include, exclude) if packs and kind is not None)
    return Counter({kind: found[kind] for kind in KINDS if found[kind]})


class _Chosen:
    """The modules within a model, and which of them are to pack what they keep.

    Attributes:
        modules: all, with their names.
        kinds: that are packed.
        only: patterns, outside which nothing is.
    """

    def __init__(self, root: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
        kinds, self.only = _selected("include", include)
        no_kinds, self._never = _selected("exclude", exclude)
        self.kinds = (kinds or frozenset(KINDS)) - no_kinds
        self.modules = [(name, module) for name, module in root.named_modules() if module is not root]
        self._classes = {name: type(module).__name__ for name, module in self.modules}
        for argument, patterns in (("include", self.only), ("exclude", self._never)):
            for pattern in patterns:
                self._check(argument, pattern)

    def __iter__(self) -> Iterator[tuple[str, nn.Module, Kind | None, bool]]:
        """Go through (name, module, kind, whether it packs)."""
        for name, module in self.modules:
            kind = kind_of(module)
            inside = not self.only or self._is_within(name, self.only)
            yield name, module, kind, inside and not self.is_excluded(name) and (kind is None or kind in self.kinds)

    def is_excluded(self, name: str) -> bool:
        """Whether a module, or one that it is within, is named in ``exclude``."""
        return self._is_within(name, self._never)

    def _is_within(self, name: str, patterns: Sequence[str]) -> bool:
        parts = name.split(".")
        within = [".".join(parts[: end + 1]) for end in range(len(parts))]
        texts = [text for place in within for text in (place, self._classes.get(place, ""))]
        return any(fnmatchcase(text, pattern) for text in texts for pattern in patterns)

    def _check(self, argument: str, pattern: str) -> None:
        if not any(fnmatchcase(text, pattern) for pair in self._classes.items() for text in pair):
            examples = [self.modules[0], self.modules[-1]] if self.modules else []
            such = ", such as " * bool(examples) + " and ".join(f"{n!r} ({type(m).__name__})" for n, m in examples)
            raise InvalidArgumentError(
                f"{argument}: {pattern!r} is neither a kind of tensor ({', '.join(KINDS)}) nor does it match the name "
                f"or the class of a module{such}"
            )


def kind_of(module: nn.Module) -> Kind | None:
    """Return what kind of tensors a module keeps, or None if nothing is known about it."""
    name = type(module).__name__
    if type(module).forward is nn.Linear.forward or is_conv1d(module):
        return "linear"
    if isinstance(module, _NORMS) or (name.endswith(("RMSNorm", "LayerNorm")) and not any(module.children())):
        return "norm"
    if isinstance(module, _ACTIVATIONS) or _is_from(module, "transformers.activations"):
        return None if getattr(module, "inplace", False) else "activation"
    if type(module) in (nn.ReLU, nn.Dropout):
        kept_by: Kind = "dropout" if type(module) is nn.Dropout else "activation"
        return None if getattr(module, "inplace", False) else kept_by
    if isinstance(module, _CONVOLUTIONS) and type(module) in _CONVOLUTIONS:
        return "convolution" if module.padding_mode == "zeros" and not isinstance(module.padding, str) else None
    return "attention" if _is_attention(module) else None


def _is_attention(module: nn.Module) -> bool:
    """Whether a module computes attention itself: it is called so, and none within it is."""
    named = [one for one in module.modules() if "attention" in type(one).__name__.lower()]
    return bool(named) and named[0] is module and len(named) == 1


def _forward(
    module: nn.Module, name: str, stash: Stash, kind: Kind | None, kinds: frozenset[Kind], linear: LinearFactory
) -> PatchedForward:
    if kind == "linear":
        return linear(module, name, stash)
    if kind == "norm":
        return NormForward(module, name, stash)
    if kind == "convolution":
        return ConvolutionForward(module, name, stash)
    if kind == "dropout":
        return DropoutForward(module, name, stash)
    if type(module) is nn.ReLU and kind == "activation":
        return ReLUForward(module, name, stash)
    if kind == "activation":
        return ActivationForward(module, name, stash)
    if kind == "attention" or isinstance(module, _LAYERS_OF_TORCH) or _gates(module):
        return RedirectedForward(module, name, stash, kinds)
    return PatchedForward(module, name, stash)


def _patch_loss(model: Any, name: str, stash: Stash, patches: Patches) -> None:
    """Let a Hugging Face language model keep no logits, if its head is a linear layer of which its loss is made."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(type(model), "loss_function"):
        return
    head = model.get_output_embeddings()
    if (
        head is None
        or type(head).forward is not nn.Linear.forward
        or shards_itself(head)
        or isinstance(head.forward, ExemptForward)
    ):
        return
    original, own = model.loss_function, inspect.unwrap(type(model).forward)
    # Others compute a loss of their own.
    if not is_causal_loss(original) or "loss_function" not in getattr(own, "__code__", own).co_names:
        return
    patches.put(HeadForward(head, f"{name}.head", stash))
    patches.put_loss(model, CausalLoss(original, head, stash, f"{name}.loss"))
    patches.counts["loss"] += 1


def _gates(module: nn.Module) -> bool:
    """Whether a module may multiply an activation function's output with something."""
    return not isinstance(module, nn.Sequential) and any(kind_of(child) == "activation" for child in module.children())


def _is_from(module: nn.Module, package: str) -> bool:
    return f"{type(module).__module__}.".startswith(f"{package}.")


def _selected(argument: str, entries: Sequence[str]) -> tuple[frozenset[Kind], list[str]]:
    if isinstance(entries, str):
        raise InvalidArgumentError(f"{argument}={entries!r} is out of range: a list, such as [{entries}]")
    kinds: Any = frozenset(entry for entry in entries if entry in KINDS)
    return kinds, [entry for entry in entries if entry not in KINDS]
