"""FZOO and MeZO: the step is the formula, weights are never disturbed by looking, and nothing bad is learned."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear

from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.kernels.rademacher import sign_tensor
from lowbit_lightning.optim import FZOO, MeZO, state_bytes
from lowbit_lightning.optim.forward_only import Evaluation, ForwardOnlyOptimizer
from lowbit_lightning.optim.fzoo import normalized_coefficients

INPUTS = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
TARGETS = (INPUTS @ torch.randn(8, 4, generator=torch.Generator().manual_seed(2))).argmax(1)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 24), nn.Linear(24, 4)
        self.dropout = nn.Dropout(0.2)
        self.to(dtype)

    def loss(self) -> Tensor:
        inputs = INPUTS.to(self.head.weight.dtype)
        return cross_entropy(self.head(self.dropout(gelu(self.hidden(inputs)))).float(), TARGETS)


def fzoo(net: nn.Module, **settings: Any) -> FZOO:
    return FZOO(net.named_parameters(), **({"lr": 1e-2, "num_perturbations": 4} | settings))


def bits(net: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("perturbation", ["rademacher", "rank1"])
@pytest.mark.parametrize("baseline", ["clean", "mean"])
def test_step_is_the_formula(perturbation: str, baseline: str) -> None:
    net = Net().eval()
    optimizer = fzoo(net, perturbation=perturbation, baseline=baseline, weight_decay=0.5, eps=1e-2)
    drawn = [
        [sign_tensor(param, optimizer.noise(group, name, param), i) for group, name, param in optimizer.trainable()]
        for i in range(4)
    ]
    before = bits(net)

    def loss_at(signs: list[Tensor], eps: float) -> float:
        moved = [param + eps * sign for param, sign in zip(before, signs, strict=True)]
        hidden = gelu(linear(INPUTS, moved[0], moved[1]))
        return float(cross_entropy(linear(hidden, moved[2], moved[3]), TARGETS))

    clean, losses = loss_at(drawn[0], 0.0), torch.tensor([loss_at(signs, 1e-2) for signs in drawn]).double()
    center = clean if baseline == "clean" else losses.mean()
    coefficients = (losses - center) / (4 * losses.std(unbiased=False))
    optimizer.step(net.loss)
    for position, (param, old) in enumerate(zip(net.parameters(), before, strict=True)):
        step = sum(float(c) * signs[position] for c, signs in zip(coefficients, drawn, strict=True))
        assert torch.allclose(param, old * (1 - 1e-2 * 0.5) - 1e-2 * step, atol=1e-5)


def test_mezo_step_is_the_formula() -> None:
    net = Net().eval()
    optimizer = MeZO(net.named_parameters(), lr=0.1, eps=1e-2)
    signs = [sign_tensor(p, optimizer.noise(group, name, p), 0) for group, name, p in optimizer.trainable()]
    before, losses = bits(net), []
    with torch.no_grad():
        for eps in (1e-2, -1e-2):
            for param, old, sign in zip(net.parameters(), before, signs, strict=True):
                param.copy_(old + eps * sign)
            losses.append(float(net.loss()))
        for param, old in zip(net.parameters(), before, strict=True):
            param.copy_(old)
    optimizer.step(net.loss)
    slope = (losses[0] - losses[1]) / 2e-2
    for param, old, sign in zip(net.parameters(), before, signs, strict=True):
        assert torch.allclose(param, old - 0.1 * slope * sign, atol=1e-6)


def test_lr_is_the_length_along_the_normalized_gradient_whatever_eps() -> None:
    slope = torch.randn(3000, dtype=torch.float64)
    slope /= slope.norm() / 7
    for eps in (1e-4, 1e-2):
        weight = nn.Parameter(torch.zeros(3000, dtype=torch.float64))
        optimizer = FZOO([weight], lr=0.1, eps=eps, num_perturbations=16)
        moved = []
        for _ in range(40):
            before = weight.detach().clone()
            optimizer.step(lambda weight=weight: 100 * torch.dot(weight, slope).float())
            moved.append(float((weight.detach() - before) @ slope) / 7)
        assert abs(sum(moved) / 40 + 0.1) < 0.02


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda net: fzoo(net), [Evaluation(0, 0), *(Evaluation(i, 1) for i in range(4))]),
        (lambda net: fzoo(net, baseline="mean"), [Evaluation(i, 1) for i in range(4)]),
        (lambda net: fzoo(net, reuse_losses=True), [Evaluation(0, 0), Evaluation(0, 1), Evaluation(1, 1)]),
        (lambda net: MeZO(net.named_parameters()), [Evaluation(0, 1), Evaluation(0, -1)]),
    ],
    ids=["clean", "mean", "reuse", "mezo"],
)
def test_forward_passes_of_a_step(
    make: Callable[[nn.Module], ForwardOnlyOptimizer], expected: list[Evaluation]
) -> None:
    optimizer, calls, net = make(net := Net()), [], net
    assert optimizer.evaluations() == expected

    def closure() -> Tensor:
        calls.append(1)
        return net.loss()

    optimizer.step(closure)
    assert len(calls) == len(expected)


def test_reused_losses_steady_sigma_each_step_centred_on_its_own_mean() -> None:
    coefficients, sigma = normalized_coefficients(1.0, [2.0, 4.0], [103.0, 107.0])
    assert sigma == math.sqrt((1 + 1 + 4 + 4) / 4)
    assert coefficients == [(2 - 1) / (2 * sigma), (4 - 1) / (2 * sigma)]


def test_a_single_perturbation_steps_by_the_sign_of_its_slope() -> None:
    assert normalized_coefficients(1.0, [1.5])[0] == [1.0]
    assert normalized_coefficients(1.0, [0.5])[0] == [-1.0]


@pytest.mark.parametrize(
    "losses",
    [[2.0, 2.0, 2.0], [2.0, 2.0 + 2**-23, 2.0], [math.inf, 1.0, 2.0], [1.0, math.nan, 2.0], [-math.inf, math.inf, 2.0]],
)
def test_losses_that_do_not_differ_or_are_not_finite_give_no_step(losses: list[float]) -> None:
    assert normalized_coefficients(losses[0], losses[1:] + losses[:1])[0] == [0.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [fzoo, lambda net: MeZO(net.named_parameters(), lr=0.0)], ids=["fzoo", "mezo"])
def test_looking_leaves_every_weight_as_it_was(make: Callable[[nn.Module], ForwardOnlyOptimizer], dtype: Any) -> None:
    net = Net(dtype)
    optimizer, before, addresses = make(net), bits(net), [param.data_ptr() for param in net.parameters()]
    seen = []

    def closure() -> Tensor:
        seen.append(bits(net))
        return net.loss()

    optimizer.skip_next_update()
    optimizer.step(closure)
    assert_same_bits(bits(net), before)
    assert [param.data_ptr() for param in net.parameters()] == addresses
    assert not torch.equal(seen[1][0], before[0])


def test_weights_are_back_after_an_error() -> None:
    net = Net()
    before, optimizer, calls = bits(net), fzoo(net), []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return net.loss()

    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step(closure)
    assert_same_bits(bits(net), before)


def test_dropout_masks_are_those_of_the_clean_pass() -> None:
    net = Net()
    masks = []

    def closure() -> Tensor:
        masks.append(torch.tensor([*torch.rand(2).tolist(), random.random(), numpy.random.rand()]))
        return net.loss()

    optimizer = fzoo(net)
    optimizer.step(closure)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    optimizer.step(closure)
    assert not torch.equal(masks[0], masks[-1])


@pytest.mark.parametrize(
    "settings",
    [{}, {"perturbation": "rank1"}, {"baseline": "mean"}, {"reuse_losses": True}],
    ids=["full", "rank1", "mean", "reuse"],
)
def test_loss_falls(settings: dict[str, Any]) -> None:
    net = Net()
    optimizer = fzoo(net, lr=2e-2, **settings)
    losses = [float(optimizer.step(net.loss)) for _ in range(200)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_rank1_signs_converge_as_full_ones_do() -> None:
    ends = {}
    for perturbation in ("rademacher", "rank1"):
        final = []
        for seed in range(3):
            torch.manual_seed(seed)
            net = Net().eval()
            optimizer = fzoo(net, perturbation=perturbation, seed=seed, num_perturbations=8)
            for _ in range(150):
                optimizer.step(net.loss)
            final.append(float(net.loss().detach()))
        ends[perturbation] = sum(final) / 3
    assert abs(math.log(ends["rank1"] / ends["rademacher"])) < 0.3


def test_bf16_weights_take_updates_below_their_resolution() -> None:
    moved = []
    for stochastic in (True, False):
        net = Net(torch.bfloat16).eval()
        optimizer, before = fzoo(net, lr=3e-5, bf16_stochastic_rounding=stochastic), bits(net)
        for _ in range(30):
            optimizer.step(net.loss)
        moved.append(float((net.hidden.weight != before[0]).float().mean()))
    assert moved[0] > 2 * moved[1]


def test_resume_is_bit_exact_even_between_micro_batches() -> None:
    straight, resumed = Net(), Net()
    settings: dict[str, Any] = {"lr": 1e-2, "reuse_losses": True, "perturbation": "rank1"}
    optimizer = fzoo(straight, **settings)
    torch.manual_seed(7)
    for _ in range(3):
        optimizer.step(straight.loss)
    optimizer.accumulate([0.1, 0.2, 0.3])  # a micro-batch
    generators = torch.get_rng_state()
    saved = copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(straight.state_dict())
    later = fzoo(resumed, **settings)
    later.load_state_dict(saved)
    for net, one in ((straight, optimizer), (resumed, later)):
        torch.set_rng_state(generators)
        for _ in range(3):
            one.step(net.loss)
    assert_same_bits(bits(straight), bits(resumed))
    assert optimizer.state_dict() == later.state_dict()


def test_copies_step_alike() -> None:
    net = Net().eval()
    optimizer = fzoo(net)
    optimizer.step(net.loss)
    twin, twins_optimizer = copy.deepcopy((net, optimizer))
    optimizer.step(net.loss)
    twins_optimizer.step(twin.loss)
    assert_same_bits(bits(net), bits(twin))


def test_there_is_no_state() -> None:
    net = Net()
    optimizer = fzoo(net)
    optimizer.initialize_state()
    optimizer.step(net.loss)
    assert state_bytes(optimizer) == 0


def test_frozen_parameters_do_not_move_and_change_nothing_for_the_others() -> None:
    net, other = Net().eval(), Net().eval()
    other.load_state_dict(net.state_dict())
    net.hidden.requires_grad_(False)
    before = bits(net.hidden)
    fzoo(net).step(net.loss)
    FZOO([(f"head.{n}", p) for n, p in other.head.named_parameters()], lr=1e-2, num_perturbations=4).step(other.loss)
    assert_same_bits(bits(net.hidden), before)
    assert_same_bits(bits(net), bits(other))


def test_tied_weights_move_once() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    optimizer = FZOO(net.parameters(), lr=0.5, num_perturbations=1)
    before = net["a"].weight.detach().clone()
    optimizer.step(lambda: net["b"](net["a"](torch.ones(2, 4))).square().mean())
    assert torch.allclose((net["b"].weight - before).abs(), torch.tensor(0.5))


def test_nonfinite_losses_are_counted_and_change_nothing() -> None:
    net = Net()
    optimizer, before = fzoo(net, weight_decay=0.1), bits(net)
    optimizer.step(lambda: net.loss() * math.inf)
    optimizer.step(lambda: torch.ones(()))
    assert_same_bits(bits(net), before)
    clock = optimizer.param_groups[0]
    assert (clock["nonfinite_skips"], clock["flat_skips"], clock["step"]) == (1, 1, 2)


def test_a_guard_can_skip_one_update() -> None:
    net = Net()
    optimizer, before = fzoo(net), bits(net)
    optimizer.skip_next_update()
    optimizer.step(net.loss)
    assert_same_bits(bits(net), before)
    optimizer.step(net.loss)
    assert not torch.equal(net.head.weight, before[2])


def test_what_took_no_part_in_the_loss_does_not_move() -> None:
    net = Net()
    optimizer, before = fzoo(net), bits(net)
    optimizer.accumulate([1.0, 1.1, 1.2, 0.9, 0.8], [net.head.weight])
    optimizer.step()
    after = bits(net)
    assert_same_bits([after[0], after[1], after[3]], [before[0], before[1], before[3]])
    assert not torch.equal(after[2], before[2])


def test_learning_rate_may_be_a_tensor_that_a_scheduler_changes() -> None:
    net = Net()
    optimizer = fzoo(net, lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    optimizer.step(net.loss)
    scheduler.step()
    before = bits(net)
    optimizer.step(net.loss)
    assert_same_bits(bits(net), before)


def test_weight_decay_and_learning_rate_may_differ_between_groups_and_nothing_else() -> None:
    net = Net().eval()
    groups = [{"params": net.hidden.parameters(), "weight_decay": 0.1}, {"params": net.head.parameters(), "lr": 0.0}]
    optimizer, before = FZOO(groups, lr=1e-2), bits(net)
    optimizer.step(net.loss)
    after = bits(net)
    assert not torch.equal(after[0], before[0])
    assert_same_bits(after[2:], before[2:])
    with pytest.raises(
        InvalidArgumentError, match=r"eps=0\.1 of parameter group 1 differs from the first group's 0\.001"
    ):
        FZOO([groups[0] | {"params": [net.hidden.weight]}, {"params": [net.head.weight], "eps": 0.1}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0 is out of range: a number >= 0"),
        ({"eps": 0.0}, r"eps=0\.0 is out of range: a number > 0"),
        ({"eps": math.inf}, r"eps=inf is out of range"),
        ({"num_perturbations": 0}, r"num_perturbations=0 is out of range: an integer >= 1"),
        ({"num_perturbations": 1, "baseline": "mean"}, r"num_perturbations=1 .* an integer >= 2 with baseline=mean"),
        ({"num_perturbations": 5, "reuse_losses": True}, r"num_perturbations=5 .* an even integer >= 4"),
        ({"perturbation": "gauss"}, r"perturbation='gauss' is out of range: rademacher or rank1"),
        ({"execution": "batched"}, r"perturbation='rademacher' is out of range: execution=batched needs rank1"),
        ({"execution": "parallel"}, r"execution='parallel' is out of range"),
        ({"baseline": "median"}, r"baseline='median' is out of range: clean or mean"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1 is out of range"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        fzoo(Net(), **settings)


def test_adams_eps_is_not_taken_for_the_distance() -> None:
    adam = torch.optim.AdamW(Net().parameters())
    with pytest.raises(InvalidArgumentError, match="eps=1e-08 comes with an Adam's parameter groups"):
        FZOO(adam.param_groups)


def test_a_closure_that_computes_gradients_is_refused() -> None:
    net = Net()
    before = bits(net)

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = net.loss()
            loss.backward()
        return loss.detach()

    with pytest.raises(
        InvalidArgumentError, match=r"'hidden\.weight' has a gradient, FZOO takes none: with a Trainer set"
    ):
        fzoo(net).step(closure)
    assert_same_bits(bits(net), before)


def test_step_needs_a_loss() -> None:
    with pytest.raises(InvalidArgumentError, match=r"FZOO\.step\(\) needs a closure"):
        fzoo(Net()).step()


@pytest.mark.parametrize(("loss", "found"), [(torch.ones(3), r"has shape \(3,\)"), (2.0, r"is 2\.0")])
def test_a_loss_that_is_no_scalar_is_refused(loss: Any, found: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match=f"the loss {found}: forward-only training needs a tensor of one element"
    ):
        fzoo(Net()).step(lambda: loss)


def test_nothing_trainable_is_refused() -> None:
    net = Net().requires_grad_(False)
    with pytest.raises(InvalidArgumentError, match="no trainable parameter"):
        fzoo(net).step(net.loss)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="real parameters"):
        FZOO([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_a_checkpoint_of_another_model_is_refused() -> None:
    net = Net()
    saved = FZOO([net.hidden.weight]).state_dict()
    with pytest.raises(CheckpointError, match="parameter groups"):
        fzoo(net).load_state_dict(saved)


def test_the_start_table_says_what_a_step_costs() -> None:
    rows = [*fzoo(Net(), perturbation="rank1").describe_technique(), *MeZO(Net().parameters()).describe_technique()]
    assert rows == [
        (
            "FZOO",
            "4 tensors, 316 parameters",
            "4 perturbations with rank-1 signs, ε 0.001, clean baseline, 5 forward passes a step",
        ),
        ("MeZO", "4 tensors, 316 parameters", "ε 0.001, 2 forward passes a step"),
    ]
