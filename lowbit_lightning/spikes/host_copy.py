"""A copy of many tensors in host memory that is overwritten again and again: buffers are made once and reused.

Two things make it safe for every optimizer and every sharding. Tensor subclasses (DTensor, torchao's quantized states)
are taken apart by ``__tensor_flatten__``, because some implement no ``clone`` and others would start a collective: what
is copied is always a plain local tensor. And tensors go back by ``copy_`` into the storage they came from, because
compiled steps, CUDA graphs and DDP's buckets hold on to it, and because a snapshot that training shares memory with is
overwritten by the next step.

From a CUDA device, large tensors travel on a side stream into pinned memory while training goes on. Two waits make
that correct: the device waits before it changes the tensors (``before_update``), the host before it reads the copy
(``synchronize``).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def tensor_leaves(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the plain local tensors that ``tensor`` is made of, with names that start with ``name``."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            if isinstance(inner := getattr(tensor, part), Tensor):  # a DTensor's mesh is a part too
                yield from tensor_leaves(f"{name}.{part}", inner)
    else:
        yield name, tensor.detach()


@dataclass(frozen=True)
class SavedTensor:
    """Stands for a tensor in a saved tree: where its bytes are, and how to make it anew."""

    name: str
    kind: type
    device: torch.device
    parts: dict[str, Any]  # of a tensor subclass: SavedTensor or another object, by attribute; else empty
    context: Any
    size: torch.Size
    stride: tuple[int, ...]


class HostCopy:
    """Host copies of tensors by name.

    Use: ``begin``, any number of ``put`` and ``pack``, ``end``; then ``copy_into`` and ``unpack`` as often as wanted.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._fresh: set[str] = set()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._background: dict[torch.device, torch.cuda.Event] = {}
        self._foreground: dict[torch.device, torch.cuda.Event] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def begin(self) -> None:
        """Starts a new copy over the old one."""
        self.synchronize()
        self._fresh = set()

    def put(self, name: str, tensor: Tensor, *, background: bool = False) -> None:
        """Copies one tensor.

        Args:
            name: Under which it is kept; unique within the copy.
            tensor: On any device, of any class that can be taken apart.
            background: Copy on a side stream. Only for tensors that nobody changes or frees before
                ``before_update`` has been called, that is for weights and optimizer states.

        """
        for leaf_name, leaf in tensor_leaves(name, tensor):
            buffer = self.tensors.get(leaf_name)
            if buffer is None or buffer.shape != leaf.shape or buffer.dtype != leaf.dtype:
                buffer = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
                self.tensors[leaf_name] = buffer
            self._fresh.add(leaf_name)
            if not leaf.is_cuda:
                buffer.copy_(leaf)
            elif background:
                with torch.cuda.stream(self._side_stream(leaf.device)):
                    buffer.copy_(leaf, non_blocking=True)
            else:
                buffer.copy_(leaf, non_blocking=True)
                self._foreground.setdefault(leaf.device, torch.cuda.Event())

    def end(self) -> None:
        """Ends the copy: forgets what was not put again, marks on the devices where the copying ends."""
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in self._fresh}
        for device in self._background:
            self._background[device].record(self._streams[device])
        for device in self._foreground:
            self._foreground[device].record(torch.cuda.current_stream(device))

    def before_update(self) -> None:
        """Lets the devices, not the host, wait for background copies; call it before weights or states change."""
        for device, event in self._background.items():
            torch.cuda.current_stream(device).wait_event(event)

    def synchronize(self) -> None:
        """Lets the host wait until every buffer is filled."""
        for event in [*self._background.values(), *self._foreground.values()]:
            event.synchronize()
        self._background, self._foreground = {}, {}

    def copy_into(self, name: str, tensor: Tensor) -> None:
        """Copies back into the storage of ``tensor``.

        Raises:
            RuntimeError: if the tensor has changed its shape, dtype or class since it was put.

        """
        if not self.fits(name, tensor):
            raise RuntimeError(f"{name} is not what it was when the snapshot was taken: it is now {_describe(tensor)}.")
        for leaf_name, leaf in tensor_leaves(name, tensor):
            leaf.copy_(self.tensors[leaf_name], non_blocking=True)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether anything was put under ``name``."""
        return any(leaf_name in self.tensors for leaf_name, _ in tensor_leaves(name, tensor))

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Whether ``tensor`` still consists of what was put under ``name``."""
        kept = ((self.tensors.get(leaf_name), leaf) for leaf_name, leaf in tensor_leaves(name, tensor))
        return all(
            buffer is not None and buffer.shape == leaf.shape and buffer.dtype == leaf.dtype for buffer, leaf in kept
        )

    def pack(self, name: str, value: Any, *, background: bool = False) -> Any:
        """Copies a tree of dicts, lists and tuples; returns it with ``SavedTensor`` for tensors, all else copied."""
        if isinstance(value, Tensor):
            self.put(name, value, background=background)
            return _saved(name, value)
        if isinstance(value, dict):
            return {key: self.pack(f"{name}/{key}", child, background=background) for key, child in value.items()}
        if type(value) in (list, tuple):
            children = (self.pack(f"{name}/{i}", child, background=background) for i, child in enumerate(value))
            return type(value)(children)
        return copy.deepcopy(value)

    def unpack(self, saved: Any, live: Any = None) -> Any:
        """Returns the tree that was packed, reusing the containers and the storage of ``live`` where they match.

        Without ``live`` everything is made anew, so that nothing the caller does reaches the copy.
        """
        if isinstance(saved, SavedTensor):
            if not isinstance(live, Tensor) or type(live) is not saved.kind or live.device != saved.device:
                return self._build(saved)
            if live.shape != saved.size or not self.fits(saved.name, live):
                return self._build(saved)
            self.copy_into(saved.name, live)
            return live
        if isinstance(saved, dict):
            target = live if isinstance(live, dict) else {}
            for stale in [key for key in target if key not in saved]:
                del target[stale]
            for key, child in saved.items():
                target[key] = self.unpack(child, target.get(key))
            return target
        if type(saved) in (list, tuple):
            lives = live if type(live) is type(saved) and len(live) == len(saved) else [None] * len(saved)
            return type(saved)(self.unpack(child, one) for child, one in zip(saved, lives, strict=True))
        return copy.deepcopy(saved)

    def _build(self, saved: SavedTensor) -> Tensor:
        if not saved.parts:
            return self.tensors[saved.name].to(saved.device, copy=True)
        parts = {
            attribute: self._build(part) if isinstance(part, SavedTensor) else part
            for attribute, part in saved.parts.items()
        }
        made: Tensor = saved.kind.__tensor_unflatten__(parts, saved.context, saved.size, saved.stride)  # type: ignore[attr-defined]
        return made

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._background:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream(device))  # the step before must have been written
            self._background[device] = torch.cuda.Event()
        return self._streams[device]


def _saved(name: str, tensor: Tensor) -> SavedTensor:
    parts: dict[str, Any] = {}
    context = None
    if is_traceable_wrapper_subclass(tensor):
        attributes, context = tensor.__tensor_flatten__()
        for attribute in attributes:
            inner = getattr(tensor, attribute)
            parts[attribute] = _saved(f"{name}.{attribute}", inner) if isinstance(inner, Tensor) else inner
    return SavedTensor(name, type(tensor), tensor.device, parts, context, tensor.shape, tensor.stride())


def _describe(tensor: Tensor) -> str:
    return f"{type(tensor).__name__} of {tuple(tensor.shape)}, {tensor.dtype}"
