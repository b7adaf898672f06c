"""Which modules pack, by kind and by pattern, and that nothing is left behind."""

import pickle

import pytest
import torch
from stash.packing import stashing
from torch import nn

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.stash import Stash, StashPrecision, kinds_in, patch
from lowbit_lightning.stash.surgery import kind_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(64, 8))


def packed(model: nn.Module, **choice: list[str]) -> dict[str, int]:
    """Elements that are packed, in tensors of (32, 64), by kind."""
    with stashing(model, 8, **choice) as (stash, _):
        y = model(torch.randn(32, 64, requires_grad=True))
        counts = {kind: round(size / (32 * 64 * 8.5 / 8)) for kind, size in stash.meter.packed_bytes.items()}
        del y
    return {kind: count for kind, count in counts.items() if count}


@pytest.mark.parametrize(("choice", "expected"), [
    ({}, {"norm": 2, "activation": 2, "linear": 1}),  # what linear layers need is recomputed, but for the last one's
    ({"include": ["linear"]}, {"linear": 5}),
    ({"include": ["linear", "norm"]}, {"norm": 2, "linear": 3}),
    ({"exclude": ["norm"]}, {"activation": 2, "linear": 3}),
    ({"include": ["*.0"]}, {"norm": 1, "activation": 1}),
    ({"include": ["Block"]}, {"norm": 2, "activation": 2}),
    ({"include": ["linear", "*.1", "*.2"]}, {"linear": 3}),
    ({"exclude": ["*.down", "*.0.*"]}, {"norm": 1, "activation": 1, "linear": 1}),
])  # fmt: skip
def test_include_and_exclude(model: nn.Module, choice: dict[str, list[str]], expected: dict[str, int]) -> None:
    assert packed(model, **choice) == expected


def test_counts_are_known_without_patching(model: nn.Module) -> None:
    assert kinds_in(model) == {"norm": 2, "linear": 5, "activation": 2}
    assert kinds_in(model, ["linear", "0"], ["*.down"]) == {"linear": 1}
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("choice", "message"), [
    ({"include": ["*.attention"]}, r"include: '\*.attention' is neither a kind of tensor .* nor does it match .*'0'"),
    ({"exclude": ["Conv2d"]}, "exclude: 'Conv2d' is neither a kind"),
    ({"include": ["convolution"]}, r"leave nothing to pack in Sequential: .* activation, linear, norm"),
    ({"include": "linear"}, r"include='linear' is out of range: a list, such as \[linear\]"),
])  # fmt: skip
def test_what_matches_nothing_is_an_error_at_the_start(
    model: nn.Module, choice: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        patch(model, Stash(StashPrecision(4)), **choice)
    assert not any("forward" in vars(module) for module in model.modules())


def test_patches_leave_nothing_behind_and_keep_forwards_that_were_there(model: nn.Module) -> None:
    layer = model[2]
    own = layer.forward
    layer.forward = own
    before = [dict(vars(module)) for module in model.modules()]
    patches = patch(model, Stash(StashPrecision(4)))
    assert model[0].up.forward.__wrapped__.__self__ is model[0].up
    patches.remove()
    patches.remove()
    assert [dict(vars(module)) for module in model.modules()] == before
    assert layer.forward is own


def test_a_patched_model_can_be_pickled(model: nn.Module) -> None:
    x = torch.randn(4, 64)
    with stashing(model, 4):
        twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))


def test_kinds_of_what_looks_alike() -> None:
    class MyLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    assert kind_of(MyLinear(4, 4)) is None  # nobody knows what it does
    assert kind_of(nn.ReLU(inplace=True)) is None
    assert kind_of(nn.SiLU(inplace=True)) is None
    assert kind_of(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")) is None
    assert kind_of(nn.BatchNorm1d(4)) is None  # running it twice would count twice
    assert kind_of(nn.MultiheadAttention(4, 2)) == "attention"
