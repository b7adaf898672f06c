"""StableSPAM: the authors' trajectories, their published resets and schedule, and faults that must not come back."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.optim import StableSPAM, state_bytes
from lowbit_lightning.spikes.momentum import reset_momentum

GOLDEN = Path(__file__).parents[1] / "golden" / "stable_spam.npz"
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "bf16_recipe": {"lr": 4e-3, "betas": (0.9, 0.95), "gammas": (0.85, 0.99999, 0.999), "weight_decay": 0.1},
}


def make(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[list[nn.Parameter], StableSPAM]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes or ((6, 5), (7,))]
    return params, StableSPAM([(f"p{i}", param) for i, param in enumerate(params)], **settings)


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """A spike every fifth step."""
    generator = torch.Generator().manual_seed(100 + step)
    found = [torch.randn(param.shape, generator=generator).to(param.dtype) for param in params]
    if step % 5 == 4:
        found[0].view(-1)[step % 3] *= 50
    return found


def run(params: list[nn.Parameter], optimizer: StableSPAM, steps: range) -> None:
    for step in steps:
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad
        optimizer.step()


def save_and_load(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(one: list[nn.Parameter], other: list[nn.Parameter]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Published:
    """One tensor stepped as the published code does it, step by step in float64, its resets and schedule included."""

    def __init__(
        self, param: Tensor, gammas: tuple[float, float, float], reset_interval: int, total: int | None, decay: float
    ) -> None:
        self.param = param.double()
        self.gammas, self.interval, self.total, self.decay = gammas, reset_interval, total, decay
        self.total_steps = self.step = 0
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.largest = self.mean = self.square = 0.0

    def update(self, grad: Tensor) -> None:
        grad = grad.double().clone()
        self.total_steps += 1
        scale = 1.0
        if self.total is not None:
            scale = 0.5 + 0.5 * (1 + math.cos(math.pi * self.total_steps / (self.total + 1))) / 2
        exp_avg, exp_avg_sq = self.exp_avg, self.exp_avg_sq
        if self.interval and self.total_steps % self.interval == 0:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.param), torch.zeros_like(self.param)
            self.step = 0
        self.step += 1
        beta1, beta2 = 0.9 * scale, 0.999
        gamma1, gamma2, gamma3 = self.gammas[0] * scale, *self.gammas[1:]
        largest = float(grad.abs().max())
        self.largest = gamma3 * self.largest + (1 - gamma3) * largest
        limit = self.largest / (1 - gamma3**self.step)
        mask = grad.abs() > limit
        grad[mask] = grad[mask] / largest * limit
        norm = float(grad.norm())
        self.mean = gamma1 * self.mean + (1 - gamma1) * norm
        self.square = gamma2 * self.square + (1 - gamma2) * norm**2
        mean_hat, square_hat = self.mean / (1 - gamma1**self.step), self.square / (1 - gamma2**self.step)
        if norm > 0:
            grad = grad / norm * mean_hat / (math.sqrt(square_hat) + 1e-8)
        self.param.mul_(1 - 1e-3 * self.decay)
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**self.step) + 1e-8
        self.param -= 1e-3 / (1 - beta1**self.step) * exp_avg / denominator


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_the_authors(case: str, variant: str) -> None:
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items() if key.startswith(case)}
    starts = [golden[f"{case}/p0/{i}"] for i in range(2)]
    params = [nn.Parameter(start.clone()) for start in starts]
    optimizer = StableSPAM(params, variant=variant, reset_interval=0, **CASES[case])
    for step in range(40):
        for i, param in enumerate(params):
            param.grad = golden[f"{case}/grads/{i}"][step].clone()
        optimizer.step()
        for i, (param, start) in enumerate(zip(params, starts, strict=True)):
            expected = golden[f"{case}/params/{i}"][step]
            close = (param.detach() - expected).abs() <= 1e-3 * (expected - start).abs()
            assert close.float().mean() > 0.995


@pytest.mark.parametrize("gammas", [(0.7, 0.9, 0.999), (0.85, 0.99999, 0.999)])
@pytest.mark.parametrize("total", [None, 15])
def test_reference_variant_is_the_published_code_with_its_resets(
    gammas: tuple[float, float, float], total: int | None
) -> None:
    params, optimizer = make(
        variant="reference", gammas=gammas, reset_interval=12, schedule_steps=total, weight_decay=0.1
    )
    twins = [Published(param.detach(), gammas, 12, total, 0.1) for param in params]
    for step in range(40):  # three resets, and past twice the schedule
        for param, grad, twin in zip(params, gradients(params, step), twins, strict=True):
            param.grad = grad
            twin.update(grad)
        optimizer.step()
        for param, twin in zip(params, twins, strict=True):
            assert torch.allclose(param.double(), twin.param, rtol=1e-5, atol=1e-6), step


def test_paper_variant_is_the_published_code_within_the_schedule_and_without_a_reset() -> None:
    params, optimizer = make(reset_interval=0, schedule_steps=30)
    twins = [Published(param.detach(), (0.7, 0.9, 0.999), 0, 30, 0.0) for param in params]
    for step in range(29):
        for param, grad, twin in zip(params, gradients(params, step), twins, strict=True):
            param.grad = grad
            twin.update(grad)
        optimizer.step()
        assert all(torch.allclose(p.double(), t.param, atol=1e-6) for p, t in zip(params, twins, strict=True))


def updates_on_a_constant_gradient(variant: str, interval: int, steps: int) -> list[float]:
    """The largest update of each step over the learning rate."""
    (param,), optimizer = make((4, 5), variant=variant, reset_interval=interval, lr=1e-3)
    grad, found = torch.randn(4, 5), []
    for _ in range(steps):
        before, param.grad = param.detach().double(), grad.clone()
        optimizer.step()
        found.append(float((param.detach().double() - before).abs().max()) / 1e-3)
    return found


def test_update_stays_at_the_learning_rate_around_a_reset() -> None:
    assert updates_on_a_constant_gradient("paper", 20, 65) == pytest.approx([1.0] * 65, abs=0.05)


def test_reference_variant_keeps_the_published_jump_at_a_reset() -> None:
    found = updates_on_a_constant_gradient("reference", 20, 24)
    assert found[:19] == pytest.approx([1.0] * 19, abs=0.01)
    assert found[19] == pytest.approx(1.988, abs=0.005)  # 1.974 by the old moments, and what AdaGN's clock adds
    assert found[20] == pytest.approx(0.744, abs=0.005)


def test_a_reset_does_not_lift_the_clipping_threshold() -> None:
    (param,), optimizer = make((50,), reset_interval=10)
    for step in range(25):
        param.grad = torch.randn(50)
        optimizer.step()
        count, average = optimizer.state[param]["statistics"][:2].tolist()
        assert count == step + 1
        limit = average / (1 - 0.999**count)
        assert 1.5 < limit < 4
    assert float(optimizer.state[param]["step"]) == 5


def test_schedule_stays_at_its_end() -> None:
    from lowbit_lightning.optim.stable_spam import schedule

    assert schedule(1, 100, 0.5, True) > 0.999
    assert schedule(99, 100, 0.5, True) == pytest.approx(0.5, abs=1e-3)
    assert {schedule(step, 100, 0.5, True) for step in (100, 150, 200, 10**6)} == {0.5}
    assert schedule(150, 100, 0.5, False) == pytest.approx(0.738, abs=1e-3)  # as published


def test_norm_of_a_bf16_model_does_not_drift() -> None:
    """Published, its averages are bf16 as well: the squared norm's stalls, and the norm grows to 2.6."""
    (param,), optimizer = make((8, 8), dtype=torch.bfloat16, gammas=(0.85, 0.99999, 0.999), reset_interval=0)
    torch.manual_seed(1)
    for _ in range(300):
        param.grad = torch.randn(8, 8).to(torch.bfloat16)
        optimizer.step()
    count, _, mean, square = optimizer.state[param]["statistics"].double().tolist()
    ratio = mean / (1 - 0.85**count) / math.sqrt(square / (1 - 0.99999**count))
    assert ratio == pytest.approx(1.0, abs=0.1)
    assert optimizer.state[param]["statistics"].dtype == torch.float32


def test_gradient_is_only_read() -> None:
    params, optimizer = make()
    for step in range(6):
        grads = gradients(params, step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True) if p.grad is not None)


def test_a_spike_is_clipped_at_all() -> None:
    """The most installed port edits a copy, so that its AdaClip does nothing."""
    (param,), optimizer = make((30,))
    for step in range(20):
        param.grad = torch.randn(30)
        if step == 19:
            param.grad[0] = 1e4
        optimizer.step()
    # A 20th of the spike is in the average by then; 0.3 of the norm comes into the mean, 3000 without clipping.
    assert float(optimizer.state[param]["statistics"][2]) == pytest.approx(0.3 * 1e4 / 20, rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_nonfinite_gradient_leaves_its_tensor_alone_and_is_counted(variant: str, value: float) -> None:
    params, optimizer = make(variant=variant)
    run(params, optimizer, range(3))
    before = copy.deepcopy([param.detach() for param in params]), copy.deepcopy(optimizer.state_dict()["state"])
    bad, good = gradients(params, 3)
    bad.view(-1)[2] = value
    params[0].grad, params[1].grad = bad, good
    optimizer.step()
    after = optimizer.state_dict()["state"]
    assert torch.equal(params[0], before[0][0])
    assert not torch.equal(params[1], before[0][1])
    assert all(torch.equal(after[0][key], before[1][0][key]) for key in after[0])
    assert optimizer.param_groups[0]["nonfinite_skips"] == 1
    run(params, optimizer, range(4, 6))
    assert all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_resume_is_bit_exact_across_resets_and_schedule(variant: str, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"variant": variant, "reset_interval": 6, "schedule_steps": 10, "dtype": dtype}
    params, optimizer = make(**settings)
    run(params, optimizer, range(8))
    saved = save_and_load({"params": [param.detach() for param in params], "optimizer": optimizer.state_dict()})
    run(params, optimizer, range(8, 16))

    resumed_params, resumed = make(**settings)
    for param, value in zip(resumed_params, saved["params"], strict=True):
        param.data.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed_params, resumed, range(8, 16))
    assert_same(params, resumed_params)
    for one, other in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def test_momentum_reset_from_outside_keeps_the_averages_of_gradients() -> None:
    params, optimizer = make()
    run(params, optimizer, range(3))
    before = [state["statistics"].clone() for state in optimizer.state.values()]
    assert reset_momentum(optimizer)
    for state, statistics in zip(optimizer.state.values(), before, strict=True):
        assert torch.equal(state["statistics"], statistics)
        assert not any(bool(state[key].any()) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_takes_over_the_moments_of_adamw() -> None:
    params, optimizer = make()
    adamw = torch.optim.AdamW(params)
    for param, grad in zip(params, gradients(params, 0), strict=True):
        param.grad = grad
    adamw.step()
    optimizer.load_state_dict(adamw.state_dict())
    for param in params:
        assert torch.equal(optimizer.state[param]["exp_avg"], adamw.state[param]["exp_avg"])
        assert float(optimizer.state[param]["step"]) == 1
        assert not optimizer.state[param]["statistics"].any()


def test_a_state_of_another_shape_is_refused() -> None:
    params, optimizer = make((4, 4))
    run(params, optimizer, range(1))
    _, other = make((4, 5))
    with pytest.raises(CheckpointError, match="p0"):
        other.load_state_dict(optimizer.state_dict())


def test_bf16_weights_take_in_updates_below_their_resolution() -> None:
    (param,), optimizer = make((4000,), dtype=torch.bfloat16, lr=2e-4, reset_interval=0)
    param.data.fill_(1.0)
    for _ in range(20):
        param.grad = torch.ones(4000, dtype=torch.bfloat16)
        optimizer.step()
    assert float(param.detach().double().mean()) == pytest.approx(1 - 20 * 2e-4, abs=4e-4)


def test_tensors_do_not_depend_on_how_many_are_stepped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = make((6, 5), (7,), (3, 3)), make((6, 5), (7,), (3, 3))
    run(*together, range(6))
    monkeypatch.setattr("lowbit_lightning.optim.stable_spam._BATCH_ELEMENTS", 8)
    run(*alone, range(6))
    assert_same(together[0], alone[0])


def test_zero_missing_empty_and_0d_parameters() -> None:
    params, optimizer = make((3, 3), (2,), (0, 4), (), weight_decay=0.0)
    before = [param.detach().clone() for param in params]
    for _ in range(3):
        params[0].grad, params[1].grad = torch.zeros(3, 3), None
        params[2].grad, params[3].grad = torch.zeros(0, 4), torch.tensor(2.0)
        optimizer.step()
    assert_same(params[:3], before[:3])  # type: ignore[arg-type]
    assert params[3].item() == pytest.approx(float(before[3]) - 3e-3, abs=1e-6)


def test_a_step_without_gradients_does_not_count() -> None:
    params, optimizer = make()
    run(params, optimizer, range(2))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["steps"] == 2


def test_learning_rate_of_zero_changes_no_bit() -> None:
    params, optimizer = make(lr=torch.tensor(0.0), weight_decay=0.1, dtype=torch.bfloat16)
    before = [param.detach().clone() for param in params]
    run(params, optimizer, range(3))
    assert_same(params, before)  # type: ignore[arg-type]


def test_maximize_steps_the_other_way() -> None:
    down, up = make(maximize=False), make(maximize=True)
    for (params, optimizer), sign in ((down, 1), (up, -1)):
        start = [param.detach().clone() for param in params]
        run(params, optimizer, range(1))
        moves = [sign * (param.detach() - old) for param, old in zip(params, start, strict=True)]
        if sign == 1:
            expected = moves
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, moves, strict=True))


def test_state_is_adamws_and_four_numbers_a_tensor() -> None:
    _, optimizer = make((10, 10))
    optimizer.initialize_state()
    assert state_bytes(optimizer) == 8 * 100 + 4 * 4 + 4
    assert optimizer.describe_technique() == [
        ("Stable-SPAM", "1 tensors, 100 parameters", "paper, γ 0.7/0.9/0.999, reset every 1000 steps")
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"gammas": (0.7, 0.9)}, "gammas=.*three numbers in"),
        ({"gammas": (0.7, 0.9, 1.0)}, "gammas="),
        ({"reset_interval": -1}, "reset_interval=-1 is out of range: an integer >= 0"),
        ({"reset_interval": 0.5}, "reset_interval=0.5"),
        ({"schedule_steps": 0}, "schedule_steps=0"),
        ({"eta_min": 2.0}, "eta_min=2.0"),
        ({"variant": "papers"}, "variant='papers' is out of range: paper or reference"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make(**settings)


def test_complex_parameters_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'w' is complex"):
        StableSPAM([("w", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))])
    (param,), optimizer = make((4, 4))
    param.grad = torch.eye(4).to_sparse()
    with pytest.raises(InvalidArgumentError, match="gradient of parameter 'p0' is sparse"):
        optimizer.step()
