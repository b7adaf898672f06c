"""Rules for gradients, value by value against their definitions in plain Python floats."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import SoloAdamW
from lowbit_lightning.optim.gradient_batch import GradientBatch
from lowbit_lightning.optim.gradient_rules import AdaClip, AdaGC, AdaGN, Averages, GradientRule, SpamClip, ZClip

SHAPES = ((4, 5), (6,), ())


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def gradients(step: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def apply(
    rules: list[GradientRule], members: list[nn.Parameter], grads: list[Tensor], optimizer: Any = None
) -> tuple[list[Tensor], GradientBatch]:
    """What the rules make of gradients, in float64, and the batch."""
    for param, grad in zip(members, grads, strict=True):
        param.grad = grad.clone().to(param.dtype)
    batch = GradientBatch(members, [f"p{i}" for i in range(len(members))])
    for rule in rules:
        rule.apply(batch, optimizer or torch.optim.SGD(members, lr=0.1), "0")
    batch.write()
    return [param.grad.double() for param in members if param.grad is not None], batch


def norm(*tensors: Tensor) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def assert_close(got: list[Tensor], expected: list[Tensor], step: int) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other.double(), rtol=2e-6, atol=0), step


def test_ada_clip_scales_what_is_above_the_average_of_maxima() -> None:
    members, rule, averages = params(), AdaClip(gamma=0.9), [0.0] * 3
    any_clipped = 0
    for step in range(12):
        grads = gradients(step, 30.0 if step in (5, 9) else 1.0)
        got, batch = apply([rule], members, grads)
        expected = []
        for i, grad in enumerate(grads):
            wide = grad.double()
            largest = float(wide.abs().max())
            averages[i] = 0.9 * averages[i] + 0.1 * largest
            limit = averages[i] / (1 - 0.9 ** (step + 1))
            is_spike = (wide.abs() > limit) & (largest > limit * (1 + 1e-6))
            any_clipped += int(is_spike.sum())
            assert bool(batch.clipped[i]) == bool(is_spike.any())
            expected.append(torch.where(is_spike, wide / largest * limit, wide))
        assert_close(got, expected, step)
        assert torch.allclose(batch.norms.double(), torch.tensor([norm(g) for g in expected], dtype=torch.float64))
    assert any_clipped > 5


@pytest.mark.parametrize("gamma2", [0.9, 0.99999])
def test_ada_gn_gives_the_norm_of_the_averages(gamma2: float) -> None:
    members, rule, mean, square = params(), AdaGN(0.7, gamma2), [0.0] * 3, [0.0] * 3
    for step in range(12):
        grads = gradients(step, 1e3 if step == 7 else 1e-3)
        got, _ = apply([rule], members, grads)
        expected = []
        for i, grad in enumerate(grads):
            size = norm(grad)
            mean[i] = 0.7 * mean[i] + 0.3 * size
            square[i] = gamma2 * square[i] + (1 - gamma2) * size**2
            mean_hat = mean[i] / (1 - 0.7 ** (step + 1))
            square_hat = square[i] / (1 - gamma2 ** (step + 1))
            expected.append(grad.double() / size * mean_hat / (math.sqrt(square_hat) + 1e-8))
        for one, other in zip(got, expected, strict=True):
            assert torch.allclose(one, other, rtol=2e-5), step


def test_ada_gn_makes_gradients_of_any_scale_unit() -> None:
    members = params()
    for scale in (1e-12, 1e-3, 1.0, 1e12):
        got, _ = apply([AdaGN()], members, gradients(0, scale))
        assert [norm(grad) for grad in got] == pytest.approx([1.0] * 3, rel=1e-3 if scale > 1e-6 else 1.0)


def test_zclip_is_its_definition() -> None:
    members, rule = params(), ZClip(alpha=0.9, z_threshold=2.0, warmup_steps=4, max_norm=6.0)
    warm: list[float] = []
    mean = variance = 0.0
    clipped = []
    for step in range(14):
        grads = gradients(step, {6: 20.0, 7: 3.0, 11: 100.0}.get(step, 1.0))
        got, _ = apply([rule], members, grads)
        total, limit = norm(*grads), math.inf
        if len(warm) < 4:
            warm.append(total)
            mean = sum(warm) / len(warm)
            variance = sum((one - mean) ** 2 for one in warm) / len(warm)
        else:
            std = math.sqrt(variance)
            z = (total - mean) / (std + 1e-6)
            if z > 2.0:
                limit = mean + 2.0 * std / (z / 2.0)
                clipped.append(step)
            taken = min(total, limit)
            mean = 0.9 * mean + 0.1 * taken
            variance = 0.9 * variance + 0.1 * (taken - mean) ** 2
        factor = min(1.0, min(limit, 6.0) / total)
        for one, grad in zip(got, grads, strict=True):
            assert torch.allclose(one, grad.double() * factor, rtol=1e-4), step
    assert {6, 11} <= set(clipped)


def test_ada_gc_is_its_definition() -> None:
    members, rule, averages = params(), AdaGC(relative=1.05, beta=0.9, absolute=2.0, warmup_steps=3), [0.0] * 3
    for step in range(10):
        grads = gradients(step, 10.0 if step == 6 else 1.0)
        got, _ = apply([rule], members, grads)
        total, expected = norm(*grads), []
        for i, grad in enumerate(grads):
            size = norm(grad)
            if step < 3:
                factor = min(1.0, 2.0 / total)
                averages[i] = size * factor if step == 0 else min(averages[i], size * factor)
            else:
                factor = min(1.0, 1.05 * averages[i] / size)
                averages[i] = 0.9 * averages[i] + 0.1 * size * factor
            expected.append(grad.double() * factor)
        for one, other in zip(got, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-5), step


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SoloAdamW])
def test_spam_clip_limits_elements_by_the_second_moment(kind: Any) -> None:
    (param,) = members = [nn.Parameter(torch.zeros(64, 64))]
    optimizer = kind(members, lr=0.1, **({"min_numel": 0, "bits": (8, 8)} if kind is SoloAdamW else {}))
    rule = SpamClip(threshold=50.0, warmup_steps=5)
    for step in range(8):
        torch.manual_seed(step)
        grad = torch.randn(64, 64)
        grad[0, 0] = 1e3 if step in (3, 6) else 1.0
        moment = torch.zeros(64, 64)
        if optimizer.state:
            state = optimizer.state[param]
            moment = optimizer.dequantized_state(param)["exp_avg_sq"] if kind is SoloAdamW else state["exp_avg_sq"]
        limits = (50.0 * moment.double()).sqrt()
        is_spike = (grad.double().abs() > limits) & (limits > 0) & (step >= 5)
        (got,), batch = apply([rule], members, [grad], optimizer)
        assert_close([got], [torch.where(is_spike, grad.double().sign() * limits, grad.double())], step)
        assert bool(batch.clipped) == bool(is_spike.any())
        assert step != 6 or is_spike[0, 0]
        optimizer.step()


def test_spam_clip_refuses_an_optimizer_without_a_second_moment() -> None:
    members = params()
    optimizer = torch.optim.SGD(members, lr=0.1, momentum=0.9)
    apply([SpamClip()], members, gradients(0), optimizer)
    optimizer.step()
    with pytest.raises(InvalidArgumentError, match=r"spam_clip.*SGD keeps none: use ada_clip"):
        apply([SpamClip()], members, gradients(1), optimizer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", [AdaClip(), AdaGN(), ZClip(warmup_steps=1), AdaGC(warmup_steps=1)])
def test_nonfinite_gradient_reaches_no_average(rule: GradientRule, value: float) -> None:
    members = params()
    for step in range(3):
        apply([rule], members, gradients(step))
    before = rule.state_dict()
    bad = gradients(3)
    bad[1][2] = value
    got, batch = apply([rule], members, bad)
    assert batch.usable.tolist() == [True, False, True]
    assert not got[1].isfinite().all()
    assert got[0].isfinite().all()
    name = "optimizer 0" if isinstance(rule, ZClip) else "p1"
    assert rule.state_dict()[name] == before[name]
    assert all(math.isfinite(number) for row in rule.state_dict().values() for number in row)


def test_rules_in_a_row_are_the_rules_one_by_one() -> None:
    together, alone = params(), params()
    many = [AdaClip(0.9), AdaGN(), AdaClip(0.8), ZClip(warmup_steps=2)]
    single = [AdaClip(0.9), AdaGN(), AdaClip(0.8), ZClip(warmup_steps=2)]
    for step in range(8):
        grads = gradients(step, 20.0 if step == 5 else 1.0)
        got, _ = apply(many, together, grads)
        expected = grads
        for rule in single:
            expected, _ = apply([rule], alone, expected)
        for one, other in zip(got, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-5), step


def test_averages_are_fp32_whatever_the_gradients_are() -> None:
    members = [nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))]
    rule = AdaGN(0.85, 0.99999)
    for step in range(50):
        torch.manual_seed(step)
        apply([rule], members, [torch.randn(8, 8)])
    count, mean, square = rule.state_dict()["p0"]
    ratio = mean / (1 - 0.85**count) / math.sqrt(square / (1 - 0.99999**count))
    assert ratio == pytest.approx(1.0, abs=0.05)
    assert 0.9 < norm(*[p.grad for p in members if p.grad is not None]) < 1.1


def test_averages_are_kept_by_name() -> None:
    kept = Averages(2)
    device, both = torch.device("cpu"), torch.tensor([True, True])
    kept.read(["a", "b"], device)
    kept.update(["a", "b"], both, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert [column.tolist() for column in kept.read(["c", "b"], device)] == [[0.0, 2.0], [0.0, 4.0]]
    kept.update(["c", "b"], torch.tensor([True, False]), torch.tensor([5.0, 9.0]), torch.tensor([6.0, 9.0]))
    assert kept.state_dict() == {"a": [1.0, 3.0], "b": [2.0, 4.0], "c": [5.0, 6.0]}
    other = Averages(2)
    other.load_state_dict(kept.state_dict())
    assert [column.tolist() for column in other.read(["c", "a"], device)] == [[5.0, 1.0], [6.0, 3.0]]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (AdaClip, {"gamma": 1.0}, "ada_clip.gamma=1.0 is out of range: a number in"),
        (AdaGN, {"gamma1": -0.1}, "ada_gn.gamma1=-0.1"),
        (AdaGN, {"eps": -1.0}, "ada_gn.eps=-1.0"),
        (ZClip, {"alpha": 1.5}, "zclip.alpha=1.5"),
        (ZClip, {"z_threshold": 0.0}, "zclip.z_threshold=0.0"),
        (ZClip, {"warmup_steps": 0}, "zclip.warmup_steps=0"),
        (ZClip, {"max_norm": 0.0}, "zclip.max_norm=0.0"),
        (AdaGC, {"relative": 0.0}, "ada_gc.relative=0.0"),
        (AdaGC, {"absolute": -1.0}, "ada_gc.absolute=-1.0"),
        (AdaGC, {"warmup_steps": 0}, "ada_gc.warmup_steps=0"),
        (SpamClip, {"threshold": 0.0}, "spam_clip.threshold=0.0"),
        (SpamClip, {"warmup_steps": -1}, "spam_clip.warmup_steps=-1"),
    ],
)
def test_bad_settings_are_named(kind: type[GradientRule], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        kind(**settings)
