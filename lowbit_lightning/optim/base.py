"""The base of this project's optimizers: who owns the state's layout, and how it is saved and loaded.

``torch.optim.Optimizer.load_state_dict`` casts every state tensor except ``step`` to its parameter's dtype, so packed
uint8 codes of a bf16 model would come back as bf16. Here state is loaded as it was saved, and a state of another layout
(other bits, another block size, another model) is refused by name instead of being trained on.

State is plain tensors, everything else that a run needs to continue is in ``param_groups``, and nothing is kept on the
object: deepcopy, pickle, ``torch.load(weights_only=True)`` and asynchronous checkpointing work as for any optimizer.
The state of a DTensor is DTensors, see :mod:`.sharding`; a whole state is loaded into shards and the other way round.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowbit_lightning.errors import CheckpointError
from lowbit_lightning.optim.sharding import placed_like

ParamGroup = dict[str, Any]
State = dict[str, Tensor]


def state_bytes(optimizer: Optimizer, group: ParamGroup | None = None) -> int:
    """Return the bytes behind all state tensors of any torch optimizer, or of one of its ``param_groups``.

    Memory that several tensors share counts once. A tensor subclass counts with the tensors that it is made of:
    torchao's with its codes and scales, a DTensor with its local shard. State that does not exist yet (before the
    first step) counts nothing.
    """
    storages: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, dict | list | tuple):
            for entry in value.values() if isinstance(value, dict) else value:
                visit(entry)
        elif isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            visit([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()  # no address: that of every meta tensor is 0

    params = optimizer.state.keys() if group is None else group["params"]
    visit([optimizer.state.get(param, {}) for param in params])
    return sum(storages.values())


class LowBitOptimizer(Optimizer):
    """Optimizer whose state keeps its dtypes through saving and loading.

    A subclass names in ``layout_keys`` the group settings that a saved state cannot change, makes an empty state in
    :meth:`new_state`, and may take over a foreign state in :meth:`convert_state`.
    """

    #: Group settings that decide which tensors the state consists of.
    layout_keys: tuple[str, ...] = ()

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group. One without names gets some where the others have them, as fine-tuning callbacks need."""
        if self.param_groups and "param_names" in self.param_groups[0]:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            number = len(self.param_groups)
            named = [p if isinstance(p, tuple) else (f"group{number}.{i}", p) for i, p in enumerate(params)]
            param_group["params"] = named
        super().add_param_group(param_group)

    def new_state(self, group: ParamGroup, name: str, param: Tensor, device: torch.device) -> State:
        """Return the state of ``param`` before its first step, allocated on ``device``.

        What has the parameter's leading dimension comes from :func:`.sharding.zeros_beside`, and eligibility is decided
        on the global shape, which is the ``shape`` of a DTensor.
        """
        raise NotImplementedError

    def convert_state(self, group: ParamGroup, name: str, param: Tensor, saved: State) -> State | None:
        """Return a state of this layout made from one of another, or None where there is no way."""
        return None

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return rows (technique, what it is active on, detail) for the table shown at the start of a run."""
        raise NotImplementedError

    def named_params(self) -> Iterator[tuple[ParamGroup, str, Tensor]]:
        """Yield (group, name, parameter); the name is the index in the optimizer where parameters came unnamed."""
        index = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for position, param in enumerate(group["params"]):
                yield group, names[position] if names else str(index), param
                index += 1

    def initialize_state(self) -> None:
        """Allocate every state tensor now: the bytes are then known, and no memory peak comes with the first step."""
        for group, name, param in self.named_params():
            if param.requires_grad and not self.state[param]:
                self.state[param].update(self.new_state(group, name, param, param.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the state; counts that live on a device become integers."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if "nonfinite_skips" in group:
                group["nonfinite_skips"] = int(group["nonfinite_skips"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping every dtype.

        A setting that the saved groups do not have keeps its present value. Tensors are copied, never aliased.

        Raises:
            CheckpointError: the saved state has another layout than this optimizer was built for; the message names
                the setting or the parameter.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        saved_counts, own_counts = [len(g["params"]) for g in groups], [len(g["params"]) for g in self.param_groups]
        if saved_counts != own_counts:
            raise CheckpointError(
                f"the checkpoint's optimizer has parameter groups of {saved_counts} tensors, this run's has "
                f"{own_counts}: resume with the model and the optimizer settings that the checkpoint was made with"
            )
        groups = [_with_tuples(saved, own) for saved, own in zip(groups, self.param_groups, strict=True)]
        for position, (own, saved) in enumerate(zip(self.param_groups, groups, strict=True)):
            self._check_layout(position, own, saved)

        state: dict[Tensor, State] = {}
        saved_ids = (saved_id for group in groups for saved_id in group["params"])
        for saved_id, (group, name, param) in zip(saved_ids, self.named_params(), strict=True):
            if saved_id in state_dict["state"]:
                state[param] = self._load_tensor_state(group, name, param, state_dict["state"][saved_id])

        own_groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        merged = [own | saved for own, saved in zip(own_groups, groups, strict=True)]
        super().load_state_dict({"state": {}, "param_groups": merged})
        self.state.update(state)

    def _check_layout(self, position: int, own: ParamGroup, saved: ParamGroup) -> None:
        for key in self.layout_keys:
            if key in saved and saved[key] != own[key]:
                raise CheckpointError(
                    f"the checkpoint's optimizer states were made with {key}={saved[key]!r} (group {position}), "
                    f"this run asks for {key}={own[key]!r}: set {key} to {saved[key]!r}, "
                    "or start without the checkpoint"
                )

    def _load_tensor_state(self, group: ParamGroup, name: str, param: Tensor, saved: State) -> State:
        expected = self.new_state(group, name, param, torch.device("meta"))
        if not saved:
            return {}
        if _layout(saved) != _layout(expected):
            converted = self.convert_state(group, name, param, saved)
            if converted is None:
                raise CheckpointError(
                    f"the checkpoint's state of parameter {name!r} is {_layout(saved)}, but "
                    f"{type(self).__name__} with this run's settings keeps {_layout(expected)}: "
                    "resume with the settings that the checkpoint was made with"
                )
            return converted
        return {
            # torch keeps step counters on the CPU; all else lives beside the parameter.
            # Contiguous, as new_state makes it: the state of a channels_last parameter may come otherwise.
            key: placed_like(value.detach(), expected[key], torch.device("cpu") if key == "step" else param.device)
            for key, value in saved.items()
        }


def _with_tuples(saved: Any, own: Any) -> Any:
    """Return ``saved`` with tuples where ``own`` has them: distributed checkpointing turns some into lists."""
    if isinstance(saved, dict) and isinstance(own, dict):
        return {key: _with_tuples(value, own.get(key)) for key, value in saved.items()}
    return tuple(saved) if isinstance(saved, list) and isinstance(own, tuple) else saved


def _layout(state: State) -> dict[str, tuple[Any, ...]]:
    return {key: (str(value.dtype).removeprefix("torch."), *value.shape) for key, value in sorted(state.items())}


def device_skips(group: ParamGroup, param: Tensor) -> Tensor | None:
    """Return the group's ``nonfinite_skips`` as the device counter that a kernel adds to, None for the CPU."""
    if not param.is_cuda:
        return None
    if not isinstance(group["nonfinite_skips"], Tensor):
        group["nonfinite_skips"] = torch.tensor(group["nonfinite_skips"], device=param.device)
    counter: Tensor = group["nonfinite_skips"]
    return counter if counter.device == param.device else None
