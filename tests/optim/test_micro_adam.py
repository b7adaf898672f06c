"""MicroAdam: the independent derivation's trajectories, exact resume in mid-window, and every bad input."""

import ast
import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.optim import MicroAdam, state_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "micro_adam.npz"


def make(
    shape: tuple[int, ...] = (50, 100), dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[nn.Parameter, MicroAdam]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape).to(dtype))
    small = {"lr": 1e-2, "min_numel": 0, "window": 4, "density": 0.05, "topk_block": 1024, "error_block": 64}
    return param, MicroAdam([("weight", param)], **(small | settings))


def run(param: nn.Parameter, optimizer: MicroAdam, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()


def save_and_load(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("case", ["global", "window"])
def test_trajectory_is_the_independent_derivation(case: str) -> None:
    golden = {key: value for key, value in np.load(GOLDEN).items() if key.startswith(case)}
    hyper = ast.literal_eval(str(golden.pop(f"{case}/hyper")))
    start, grads, params, error = (torch.from_numpy(golden[f"{case}/{k}"]) for k in ("p0", "grads", "params", "error"))
    param = nn.Parameter(start.clone())
    optimizer = MicroAdam(
        [param], lr=hyper["lr"], betas=(hyper["b1"], hyper["b2"]), eps=hyper["eps"], weight_decay=hyper["wd"],
        window=hyper["window"], density=hyper["density"], topk_block=hyper["tb"], error_block=hyper["eb"],
        bias_correction=hyper["bc"],
    )  # fmt: skip
    for grad, expected in zip(grads, params, strict=True):
        param.grad = grad.clone()
        optimizer.step()
        close = (param.detach() - expected).abs() <= 1e-3 * (expected - start).abs()
        assert close.float().mean() > 0.999
    assert torch.allclose(optimizer.dequantized_error(param), error, atol=1e-5)


def test_a_whole_gradient_in_an_unfilled_window_is_torch_adamw() -> None:
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-6}
    param, optimizer = make((7, 130), density=1.0, window=12, topk_block=128, **settings)
    reference = nn.Parameter(param.detach().clone())
    torch_optimizer = torch.optim.AdamW([reference], **settings)
    for step in range(12):
        torch.manual_seed(step)
        param.grad = torch.randn(7, 130).bfloat16().float()  # the window keeps bf16
        reference.grad = param.grad.clone()
        optimizer.step()
        torch_optimizer.step()
        assert torch.allclose(param, reference, rtol=1e-5, atol=1e-6)
    moments, expected = optimizer.dequantized_state(param), torch_optimizer.state[reference]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(moments[key], expected[key], rtol=1e-4, atol=1e-7)
    assert not optimizer.dequantized_error(param).any()


@pytest.mark.parametrize("bias_correction", ["global", "window"])
def test_a_whole_gradient_in_a_full_window_is_adamw_with_truncated_averages(bias_correction: Any) -> None:
    window, (beta1, beta2) = 3, (0.9, 0.99)
    param, optimizer = make((5, 40), density=1, window=window, betas=(beta1, beta2), bias_correction=bias_correction)
    grads: list[Tensor] = []
    for t in range(1, 9):
        before = param.detach().clone()
        grads.append(torch.randn(5, 40).bfloat16().float())
        param.grad = grads[-1].clone()
        optimizer.step()
        recent, terms = grads[-window:][::-1], min(t, window) if bias_correction == "window" else t
        first = sum(beta1**age * grad for age, grad in enumerate(recent)) * (1 - beta1) / (1 - beta1**terms)
        second = sum(beta2**age * grad**2 for age, grad in enumerate(recent)) * (1 - beta2) / (1 - beta2**terms)
        expected = before - 1e-2 * first / (torch.as_tensor(second).sqrt() + 1e-8)
        assert torch.allclose(param, expected, atol=1e-6)


@pytest.mark.parametrize(("bias_correction", "growth"), [("global", 6.5), ("window", 1.0)])
def test_published_step_grows_with_t_and_the_windows_does_not(bias_correction: Any, growth: float) -> None:
    param, optimizer = make((1, 64), density=1, window=10, bias_correction=bias_correction)
    optimizer.initialize_state()
    param.grad = torch.ones_like(param)
    for _ in range(10):
        optimizer.step()
    optimizer.state[param]["step"].fill_(20_000)  # a multiple of the window
    before = param.detach().clone()
    optimizer.step()
    assert ((before - param) / 1e-2).mean().item() == pytest.approx(growth, rel=0.01)


@pytest.mark.parametrize("error_rounding", ["nearest", "stochastic"])
def test_error_stays_bounded_on_a_stochastic_quadratic(error_rounding: Any) -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 64))
    optimizer = MicroAdam([param], lr=1e-3, error_rounding=error_rounding)
    curvature, norms = torch.rand(64, 64) + 0.1, []
    for _ in range(600):
        param.grad = curvature * param.detach() + 0.1 * torch.randn(64, 64)
        optimizer.step()
        norms.append(float(optimizer.dequantized_error(param).norm()))
    assert max(norms[300:]) < 1.1 * max(norms[:300])


def test_least_squares_at_one_percent_ends_as_low_as_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    target, features = torch.randn(64, 64, generator=generator) / 8, torch.randn(4096, 64, generator=generator)
    labels = features @ target + 0.1 * torch.randn(4096, 64, generator=generator)
    losses = {}
    for name in ("adam", "micro_adam"):
        weight, steps = nn.Parameter(torch.zeros(64, 64)), 1000
        optimizer: torch.optim.Optimizer = torch.optim.Adam([weight], lr=1e-2)
        if name == "micro_adam":
            optimizer = MicroAdam([weight], lr=1e-2, bias_correction="window")
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(steps):
            batch = slice(step * 128 % 4096, step * 128 % 4096 + 128)
            loss = (features[batch] @ weight - labels[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        losses[name] = float((features @ weight - labels).square().mean().detach())
    assert losses["micro_adam"] < 1.1 * losses["adam"]


def test_state_takes_no_more_bytes_than_promised() -> None:
    param = nn.Parameter(torch.zeros(512, 1000))
    optimizer = MicroAdam([param])
    optimizer.initialize_state()
    assert state_bytes(optimizer) / param.numel() <= 0.92
    assert sum(value.nbytes for value in save_and_load(optimizer.state_dict())["state"][0].values()) <= 0.92 * 512_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [{}, {"density": "auto"}, {"error_rounding": "stochastic", "feedback": 0.1, "weight_decay": 0.1}]
)
def test_resume_in_mid_window_is_bit_exact_and_keeps_dtypes(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    param, optimizer = make(dtype=dtype, **settings)
    run(param, optimizer, range(6))
    saved_param, saved_state = save_and_load([param.detach(), optimizer.state_dict()])
    run(param, optimizer, range(6, 12))

    resumed, fresh = make(dtype=dtype, **settings)
    resumed.data.copy_(saved_param)
    fresh.load_state_dict(saved_state)
    for key, value in saved_state["state"][0].items():
        assert fresh.state[resumed][key].dtype == value.dtype
        assert torch.equal(fresh.state[resumed][key], value)
    run(resumed, fresh, range(6, 12))
    assert torch.equal(param, resumed)
    for key, value in optimizer.state[param].items():
        assert torch.equal(value, fresh.state[resumed][key])


def test_indices_of_the_largest_block_survive_saving() -> None:
    param, optimizer = make((1, 65536), torch.bfloat16, topk_block=65536, density=1 / 65536)
    places = [301, 32767, 32768, 65535]
    for place in places:
        param.grad = torch.zeros_like(param)
        param.grad[0, place] = 1000.0
        optimizer.step()
    resumed, fresh = make((1, 65536), torch.bfloat16, topk_block=65536, density=1 / 65536)
    fresh.load_state_dict(save_and_load(optimizer.state_dict()))
    assert fresh.dequantized_state(resumed)["exp_avg"].nonzero()[:, 1].tolist() == places


def test_deepcopy_and_pickle_continue_identically() -> None:
    param, optimizer = make()
    run(param, optimizer, range(2))
    copies = [copy.deepcopy((param, optimizer)), pickle.loads(pickle.dumps((param, optimizer)))]
    run(param, optimizer, range(2, 4))
    for other_param, other in copies:
        run(other_param, other, range(2, 4))
        assert torch.equal(param, other_param)


@pytest.mark.parametrize(
    ("key", "value"),
    [("window", 5), ("density", 0.1), ("topk_block", 512), ("error_block", 32), ("min_numel", 10**6)],
)
def test_a_checkpoint_of_another_layout_is_refused_by_name(key: str, value: Any) -> None:
    param, optimizer = make()
    run(param, optimizer, range(1))
    _, other = make(**{key: value})
    with pytest.raises(CheckpointError, match=key):
        other.load_state_dict(optimizer.state_dict())


def test_a_tensor_without_gradient_does_not_age() -> None:
    ends = []
    for idle in (0, 3):
        param, optimizer = make()
        run(param, optimizer, range(2))
        for _ in range(idle):
            param.grad = None
            optimizer.step()
        assert optimizer.state[param]["step"] == 2
        run(param, optimizer, range(2, 8))
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_gradient_is_only_read() -> None:
    for settings in ({}, {"maximize": True, "density": "auto", "feedback": 0.1}):
        param, optimizer = make(**settings)
        run(param, optimizer, range(2))
        assert param.grad is not None
        before, grad = param.grad.clone(), param.grad
        optimizer.step()
        assert param.grad is grad
        assert torch.equal(param.grad, before)


def test_maximize_is_the_mirror_image() -> None:
    ends = []
    for sign, maximize in ((1, False), (-1, True)):
        param, optimizer = make(maximize=maximize)
        for step in range(6):
            torch.manual_seed(step)
            param.grad = sign * torch.randn(param.shape)
            optimizer.step()
        ends.append(param.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(value: float) -> None:
    param, optimizer = make()
    run(param, optimizer, range(2))
    before = copy.deepcopy((param.detach(), dict(optimizer.state[param])))
    param.grad = torch.randn(param.shape)
    param.grad[3, 7] = value
    optimizer.step()
    assert torch.equal(param, before[0])
    for key, tensor in before[1].items():
        assert torch.equal(optimizer.state[param][key], tensor)
    assert optimizer.param_groups[0]["nonfinite_skips"] == 1


@pytest.mark.parametrize("density", [0.05, "auto"])
def test_zero_gradients_at_zero_lr_leave_weights_and_error_unchanged(density: Any) -> None:
    """What distributed checkpointing does once before it loads."""
    for dtype in (torch.float32, torch.bfloat16):
        param, optimizer = make(dtype=dtype, lr=0.0, eps=0.0, density=density)
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param, before)
        assert not optimizer.dequantized_error(param).any()
        assert not optimizer.state[param]["values"].any()


def test_constant_blocks_are_finite_and_keep_their_error() -> None:
    param, optimizer = make((4, 256), topk_block=256, density=0.01)
    param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    error = optimizer.dequantized_error(param)
    assert (error == 0.5).sum() == 4 * (256 - 3)
    assert (error == 0).sum() == 4 * 3
    assert param.isfinite().all()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param.isfinite().all()


def test_unusual_tensors_are_stepped() -> None:
    shapes = [(), (0,), (0, 128), (5,), (3, 1), (1, 1), (2, 100_003), (64, 3, 7, 7)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    frozen = nn.Parameter(torch.ones(4, 128), requires_grad=False)
    without_grad = nn.Parameter(torch.ones(4, 128))
    optimizer = MicroAdam([*params, frozen, without_grad], lr=0.1, min_numel=0)
    optimizer.initialize_state()
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        assert not param.numel() or (param < 1).any()
        assert param.isfinite().all()
    for untouched in (frozen, without_grad):
        assert torch.equal(untouched, torch.ones(4, 128))
    assert frozen not in optimizer.state


def test_small_tensors_and_vectors_are_stepped_as_by_adamw() -> None:
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}
    torch.manual_seed(0)
    for shape in ((10_000,), (63, 65), ()):
        param = nn.Parameter(torch.randn(shape))
        reference = nn.Parameter(param.detach().clone())
        optimizers = MicroAdam([param], **settings), torch.optim.AdamW([reference], **settings)
        for _ in range(5):
            param.grad = torch.randn(shape)
            reference.grad = param.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert torch.allclose(param, reference, rtol=1e-5, atol=1e-6)
        assert set(optimizers[0].state[param]) == {"step", "exp_avg", "exp_avg_sq"}
        assert optimizers[0].compression(param) is None


def test_memory_format_does_not_matter() -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(32, 16, 3, 3), torch.randn(32, 16, 3, 3)
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(start.clone().to(memory_format=memory_format))
        optimizer = MicroAdam([param])
        for _ in range(3):
            param.grad = grad.to(memory_format=memory_format)
            optimizer.step()
        ends.append(param.detach().contiguous())
    assert torch.equal(*ends)


def test_at_most_the_window_moves_without_weight_decay() -> None:
    param, optimizer = make((64, 64), density=0.01, topk_block=4096, window=3)
    start = param.detach().clone()
    for step in range(1, 6):
        before = param.detach().clone()
        run(param, optimizer, range(step, step + 1))
        assert (param != before).sum() <= min(step, 3) * 41
    assert (param != start).sum() > 3 * 41


def test_feedback_sends_its_share_of_the_error_at_once() -> None:
    param, optimizer = make(feedback=0.25, lr=1.0)
    other, without = make(lr=1.0)
    run(param, optimizer, range(1))
    run(other, without, range(1))
    error = without.dequantized_error(other)
    assert torch.allclose(other - param, 0.25 * error, atol=1e-5)
    assert torch.allclose(optimizer.dequantized_error(param), 0.75 * error, rtol=0.02, atol=1e-2)


def test_automatic_density_holds_its_target_and_its_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale, bounds, target in ((1.0, (0.01, 0.9), 0.5), (0.0, (0.01, 0.02), 0.9), (0.0, (0.1, 0.5), 1e-6)):
        param, optimizer = make((4, 1024), density="auto", density_bounds=bounds, caught_target=target)
        densities, caught = [], []
        for _ in range(150):
            heavy = torch.exp(scale * torch.randn(4, 1024, generator=generator))  # few elements hold most energy
            param.grad = torch.randn(4, 1024, generator=generator) * heavy
            optimizer.step()
            made = optimizer.compression(param)
            assert made is not None
            densities.append(made.selected / param.numel())
            caught.append(made.caught)
        assert all(0.99 * bounds[0] <= density <= 1.03 * bounds[1] for density in densities)
        if scale:
            assert np.mean(caught[100:]) == pytest.approx(target, abs=0.04)
            assert 5 * bounds[0] < np.mean(densities[100:]) < bounds[1] / 2
        else:  # where the target cannot be met, or is met by less than the least, the bound is held
            assert densities[-1] == pytest.approx(bounds[1] if target > 0.5 else bounds[0], rel=0.05)


def test_a_learning_rate_may_change_and_may_be_a_tensor() -> None:
    ends = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        param, optimizer = make(lr=lr)
        run(param, optimizer, range(1))
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.02)
        else:
            optimizer.param_groups[0]["lr"] = 0.02
        run(param, optimizer, range(1, 3))
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_seed_and_name_choose_the_noise() -> None:
    ends = {}
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(32, 128))
        optimizer = MicroAdam([(name, param)], error_rounding="stochastic", seed=seed)
        run(param, optimizer, range(3))
        ends[name, seed] = optimizer.dequantized_error(param)
    assert not torch.equal(ends["a", 0], ends["a", 1])
    assert not torch.equal(ends["a", 0], ends["b", 0])


@pytest.mark.parametrize(("dtype", "lr", "steps"), [(torch.bfloat16, 1e-3, 105), (torch.float16, 2e-4, 200)])
def test_half_precision_weights_feel_a_decay_below_their_resolution(dtype: torch.dtype, lr: float, steps: int) -> None:
    for stochastic, expected in ((True, (1 - lr) ** steps), (False, 1.0)):
        param = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = MicroAdam([param], lr=lr, weight_decay=1.0, bf16_stochastic_rounding=stochastic)
        for _ in range(steps):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        assert param.float().mean().item() == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -1.0),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("window", 0),
        ("window", 2.5),
        ("density", 0.0),
        ("density", 1.5),
        ("density", "much"),
        ("topk_block", 0),
        ("topk_block", 65537),
        ("error_block", 0),
        ("error_block", 63),
        ("min_numel", -1),
        ("error_rounding", "up"),
        ("bias_correction", "none"),
        ("feedback", 1.0),
        ("feedback", -0.1),
        ("caught_target", 0.0),
        ("density_bounds", (0.2, 0.1)),
        ("density_bounds", (0.0, 0.1)),
    ],
)
def test_bad_arguments_are_named_with_value_and_range(argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{argument}=.* is out of range"):
        make(**{argument: value})


def test_sparse_gradients_and_complex_parameters_are_refused() -> None:
    param, optimizer = make((16, 128))
    param.grad = torch.eye(16, 128).to_sparse()
    with pytest.raises(InvalidArgumentError, match="sparse=False"):
        optimizer.step()
    with pytest.raises(InvalidArgumentError, match="complex"):
        MicroAdam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_settings_may_differ_between_groups() -> None:
    params = [nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
    optimizer = MicroAdam([{"params": params[0], "window": 2}, {"params": params[1], "density": "auto"}])
    optimizer.initialize_state()
    assert optimizer.state[params[0]]["values"].shape == (2, 41)
    assert optimizer.state[params[1]]["values"].shape == (10, 82)
    assert [row[2] for row in optimizer.describe_technique()] == [
        "density 0.01, window 2, global bias correction",
        "automatic density, window 10, global bias correction",
    ]
