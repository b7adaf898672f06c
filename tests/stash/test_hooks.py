"""What generic hooks pack, and what they leave alone."""

from typing import Any

import pytest
import torch
from stash.packing import backward, relative_error, stashing
from torch import Tensor, nn
from torch.nn.functional import softmax

from lowbit_lightning.stash import Stash, StashPrecision, packed_by_hooks

ROWS, WIDTH = 64, 64
SIZE = ROWS * WIDTH * 4


@pytest.fixture
def stash() -> Stash:
    stash = Stash(StashPrecision(4, rounding="nearest"))
    stash.begin_step(0)
    return stash


def leaf(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, WIDTH)), generator=torch.Generator().manual_seed(0)).requires_grad_()


def packed(stash: Stash) -> int:
    """How many tensors of (ROWS, WIDTH) were packed, at 8 bits."""
    count = stash.meter.packed_bytes["other"] / (SIZE * 8.5 / 32)
    assert count == int(count)
    return int(count)


def test_what_several_operations_save_is_packed_once_at_8_bits(stash: Stash) -> None:
    x = leaf()
    with packed_by_hooks(stash):
        hidden = x * 2
        y = hidden.square().sum() + hidden.exp().sum() + (hidden.t() * 3).t().square().sum()
    assert packed(stash) == 3  # hidden, its exponential, and three times it
    y.backward()  # type: ignore[no-untyped-call]
    expected = 8 * x + 2 * (2 * x).exp() + 72 * x
    assert relative_error(x.grad, expected.detach()) < 0.02  # type: ignore[arg-type]
    del y
    assert stash.meter.live_bytes == 0


@pytest.mark.parametrize("operation", [
    lambda x, w: (softmax(x + 0, -1) * leaf(ROWS, 1)).sum(),
    lambda x, w: (x.log_softmax(-1) * leaf(ROWS, 1)).sum(),
    lambda x, w: (x + 0).masked_fill(torch.ones(ROWS, WIDTH).tril() == 0, -torch.inf).exp()[:, 0].sum(),
], ids=["softmax", "log-softmax", "masked"])  # fmt: skip
def test_softmax_outputs_and_masked_scores_stay_exact(stash: Stash, operation: Any) -> None:
    one, other = leaf(), leaf()
    operation(one, None).backward()
    with packed_by_hooks(stash):
        loss = operation(other, None)
    loss.backward()
    assert torch.isfinite(other.grad).all()  # type: ignore[arg-type]
    assert relative_error(other.grad, one.grad) < 0.01  # type: ignore[arg-type]


def test_infinities_wherever_they_come_from_stay_exact(stash: Stash) -> None:
    x = leaf()
    bias = torch.zeros(ROWS, WIDTH).masked_fill(torch.ones(ROWS, WIDTH).tril() == 0, -torch.inf)
    with (
        packed_by_hooks(stash),
        pytest.warns(UserWarning, match="the model saves what AddBackward0 made .* not finite"),
    ):
        y = torch.logsumexp(x + bias, -1).sum()
    assert stash.meter.live_bytes == 0
    y.backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(x.grad, softmax(x + bias, -1), atol=1e-6)  # type: ignore[arg-type]


def test_parameters_their_views_and_their_casts_are_left_alone(stash: Stash) -> None:
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with packed_by_hooks(stash):
        y = (x @ weight.t()).sum(), nn.functional.conv1d(x[None], weight.view(WIDTH, WIDTH, 1)).sum()
        cast = (x.bfloat16() @ weight[:, :].t().to(torch.bfloat16)).sum()
    # x is a leaf, and so held by whoever made it; only its cast was made for autograd.
    assert stash.meter.live_bytes == SIZE / 4 * 8.5 / 8
    assert stash.meter.packed_bytes["other"] == SIZE / 4 * 8.5 / 8 + x.nbytes
    torch.stack([*y, cast.float()]).sum().backward()


def test_constants_integers_and_small_tensors_are_left_alone(stash: Stash) -> None:
    x, table = leaf(), torch.randn(ROWS, WIDTH)
    with packed_by_hooks(stash):
        y = (
            (x * table).sum()
            + x.gather(1, torch.zeros(ROWS, WIDTH, dtype=torch.long)).sum()
            + x[0, :200].square().sum()
        )
    assert stash.meter.live_bytes == 0
    y.backward()  # type: ignore[no-untyped-call]


def test_hooks_within_have_the_last_word(stash: Stash) -> None:
    x, seen = leaf(), []
    with (
        packed_by_hooks(stash),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t),
    ):
        (x * 2).square().sum()
    assert packed(stash) == 0
    assert seen


def test_a_module_that_is_left_alone_is_left_alone_by_hooks_too() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).square()

    module = nn.ModuleDict({"one": Square(), "other": Square()})
    x = leaf()
    for exclude, count in ((["*.one"], 1), (["Square"], 0), ([], 2)):
        with stashing(module, 4, exclude=exclude) as (stash, _), packed_by_hooks(stash):
            (module["one"](x) + module["other"](x)).sum()
            assert stash.meter.packed_bytes["other"] == pytest.approx(SIZE * (count * 8.5 / 32 + 2 - count))


def test_a_cast_of_a_weight_that_no_graph_saw_is_not_used_by_a_later_one() -> None:
    """Autocast caches casts; one that is made where gradients are off would lose the gradient of a tied weight."""
    module = nn.ModuleDict({"tied": nn.Linear(WIDTH, WIDTH, bias=False), "norm": nn.LayerNorm(WIDTH)})
    x = torch.randn(ROWS, WIDTH)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            first = module["norm"](module["tied"](x))
            value: Tensor = (first @ module["tied"].weight).float().square().mean()
        return value

    _, plain = backward(module, loss)
    with stashing(module, 8) as (stash, _):
        _, found = backward(module, loss, stash)
    assert relative_error(found, plain) < 0.03
