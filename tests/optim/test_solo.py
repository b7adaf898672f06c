"""SoloAdamW: the authors' trajectories, torch's AdamW as the limit at 32 bits, exact resume, and every bad input."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.optim import SoloAdamW, adjusted_beta1, state_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "solo.npz"


def make(
    shape: tuple[int, ...] = (16, 128), dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[nn.Parameter, SoloAdamW]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape).to(dtype))
    return param, SoloAdamW([("weight", param)], **({"lr": 1e-2, "min_numel": 0} | settings))


def run(param: nn.Parameter, optimizer: SoloAdamW, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()


def save_and_load(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("case", "bits", "betas", "quantile"),
    [
        ("bits4_2", (4, 2), (0.9, 0.999), 0.1),
        ("bits4_3", (4, 3), (0.9, 0.99), 0.05),
        ("bits2_2", (2, 2), (0.5, 0.999), 0.1),
    ],
)
def test_trajectory_is_the_authors(
    case: str, bits: tuple[int, int], betas: tuple[float, float], quantile: float
) -> None:
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items() if key.startswith(case)}
    start = golden[f"{case}/p0"]
    param = nn.Parameter(start.clone())
    optimizer = SoloAdamW(
        [param], lr=1e-2, weight_decay=0.1, betas=betas, bits=bits, quantile=quantile,
        stochastic_rounding=False, reference_bits=None, min_numel=0,
    )  # fmt: skip
    for grad, expected in zip(golden[f"{case}/grads"], golden[f"{case}/params"], strict=True):
        param.grad = grad.clone()
        optimizer.step()
        # Two elements in two thousand lie on the edge between two codes.
        close = (param.detach() - expected).abs() <= 1e-3 * (expected - start).abs()
        assert close.float().mean() > 0.999
    for key, moment in optimizer.dequantized_state(param).items():
        assert torch.allclose(moment, golden[f"{case}/{key}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("maximize", [False, True])
def test_at_32_bits_it_is_torch_adamw(maximize: bool) -> None:
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-6, "maximize": maximize}
    param, optimizer = make((7, 130), bits=(32, 32), **settings)
    reference = nn.Parameter(param.detach().clone())
    torch_optimizer = torch.optim.AdamW([reference], **settings)
    for step in range(20):
        torch.manual_seed(step)
        param.grad = torch.randn(7, 130)
        reference.grad = param.grad.clone()
        optimizer.step()
        torch_optimizer.step()
    assert torch.allclose(param, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "limit"), [((4, 2), 0.85), ((3, 2), 0.72), ((2, 2), 0.60), ((8, 8), 2.1), ((4, 32), 4.6), ((32, 2), 4.4)]
)
def test_state_takes_no_more_bytes_than_promised(bits: tuple[int, int], limit: float) -> None:
    param, optimizer = make((64, 512), bits=bits)
    optimizer.initialize_state()
    assert state_bytes(optimizer) / param.numel() <= limit
    assert state_bytes(optimizer) == state_bytes(optimizer, optimizer.param_groups[0])


def test_adjusted_beta1_is_the_papers_table() -> None:
    table = {(4, 8): 0.350, (4, 7): 0.518, (4, 6): 0.695, (4, 5): 0.820, (3, 5): 0.694, (2, 8): 0.116, (2, 5): 0.527}
    for (bits, reference), expected in table.items():
        assert adjusted_beta1(0.9, bits, reference) == pytest.approx(expected, abs=0.012)


def test_beta1_is_never_raised() -> None:
    for bits in (5, 8, 32):
        assert adjusted_beta1(0.9, bits, 5) == 0.9
    assert adjusted_beta1(0.9, 2, None) == 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [(4, 2), (3, 8), (32, 32)])
def test_resume_is_bit_exact_and_keeps_dtypes(dtype: torch.dtype, bits: tuple[int, int]) -> None:
    param, optimizer = make((9, 200), dtype, bits=bits)
    run(param, optimizer, range(3))
    saved_param, saved_state = save_and_load([param.detach(), optimizer.state_dict()])
    run(param, optimizer, range(3, 6))

    resumed, fresh = make((9, 200), dtype, bits=bits)
    resumed.data.copy_(saved_param)
    fresh.load_state_dict(saved_state)
    for key, value in saved_state["state"][0].items():
        assert fresh.state[resumed][key].dtype == value.dtype
    run(resumed, fresh, range(3, 6))
    assert torch.equal(param, resumed)
    for key, value in optimizer.state[param].items():
        assert torch.equal(value, fresh.state[resumed][key])


def test_loading_twice_from_one_snapshot_is_bit_exact() -> None:
    param, optimizer = make()
    run(param, optimizer, range(2))
    weights, snapshot = param.detach().clone(), copy.deepcopy(optimizer.state_dict())
    ends = []
    for _ in range(2):
        param.data.copy_(weights)
        optimizer.load_state_dict(snapshot)
        run(param, optimizer, range(2, 5))
        ends.append(param.detach().clone())
    assert torch.equal(*ends)


def test_deepcopy_and_pickle_continue_identically() -> None:
    param, optimizer = make()
    run(param, optimizer, range(2))
    copies = [copy.deepcopy((param, optimizer)), pickle.loads(pickle.dumps((param, optimizer)))]
    run(param, optimizer, range(2, 4))
    for other_param, other in copies:
        run(other_param, other, range(2, 4))
        assert torch.equal(param, other_param)


def test_a_torch_adamw_checkpoint_is_taken_over() -> None:
    param, optimizer = make((16, 128), bits=(8, 8))
    theirs = torch.optim.AdamW([param], lr=1e-3)
    run(param, theirs, range(5))
    optimizer.load_state_dict(theirs.state_dict())
    state = optimizer.dequantized_state(param)
    expected = theirs.state[param]
    assert optimizer.state[param]["step"] == 5
    assert (
        torch.nn.functional.cosine_similarity(state["exp_avg"].flatten(), expected["exp_avg"].flatten(), dim=0) > 0.999
    )
    floor = torch.quantile(expected["exp_avg_sq"], 0.1, dim=-1, keepdim=True)  # the last level of each block of 128
    assert torch.allclose(state["exp_avg_sq"], expected["exp_avg_sq"].maximum(floor), rtol=0.02)
    assert optimizer.param_groups[0]["bits"] == (8, 8)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(("key", "value"), [("bits", (2, 2)), ("block_size", 64), ("min_numel", 10**6)])
def test_a_checkpoint_of_another_layout_is_refused_by_name(key: str, value: Any) -> None:
    param, optimizer = make()
    run(param, optimizer, range(1))
    _, other = make(**{key: value})
    with pytest.raises(CheckpointError, match=key):
        other.load_state_dict(optimizer.state_dict())


def test_a_checkpoint_of_another_model_is_refused_by_name() -> None:
    param, optimizer = make()
    run(param, optimizer, range(1))
    _, other = make((16, 256))
    with pytest.raises(CheckpointError, match="'weight'"):
        other.load_state_dict(optimizer.state_dict())
    two = SoloAdamW([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))])
    with pytest.raises(CheckpointError, match=r"\[1\] tensors, this run's has \[2\]"):
        two.load_state_dict(optimizer.state_dict())


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


def test_zero_gradients_at_zero_lr_leave_weights_and_zero_states_unchanged() -> None:
    """What distributed checkpointing does once before it loads."""
    for dtype in (torch.float32, torch.bfloat16):
        param, optimizer = make(dtype=dtype, lr=0.0)
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param, before)
        state = optimizer.dequantized_state(param)
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


def test_unusual_tensors_are_stepped() -> None:
    shapes = [(), (0,), (0, 128), (5,), (3, 1), (2, 100_000), (64, 3, 7, 7)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    frozen = nn.Parameter(torch.ones(4, 128), requires_grad=False)
    without_grad = nn.Parameter(torch.ones(4, 128))
    optimizer = SoloAdamW([*params, frozen, without_grad], lr=0.1, min_numel=0)
    optimizer.initialize_state()
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        assert (param < 1).all()
        assert param.isfinite().all()
    for untouched in (frozen, without_grad):
        assert torch.equal(untouched, torch.ones(4, 128))
    assert frozen not in optimizer.state


def test_memory_format_does_not_matter() -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(32, 16, 3, 3), torch.randn(32, 16, 3, 3)
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(start.clone().to(memory_format=memory_format))
        optimizer = SoloAdamW([param], min_numel=0)
        for _ in range(3):
            param.grad = grad.to(memory_format=memory_format)
            optimizer.step()
        ends.append(param.detach().contiguous())
    assert torch.equal(*ends)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """The ground for sharding along the first dimension: a row's codes come from that row alone."""
    torch.manual_seed(0)
    whole, _ = make((8, 200))
    half = nn.Parameter(whole.detach()[:4].clone())
    grads = [torch.randn(8, 200) for _ in range(4)]
    for param in (whole, half):
        optimizer = SoloAdamW([("weight", param)], min_numel=0)
        for grad in grads:
            param.grad = grad[: len(param)].clone()
            optimizer.step()
    assert torch.equal(whole[:4], half)


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


def test_one_cycle_moves_lr_and_betas() -> None:
    param, optimizer = make()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for step in range(9):
        run(param, optimizer, range(step, step + 1))
        scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    assert param.isfinite().all()


def test_overrides_match_names_and_the_first_pattern_wins() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 128), "head": nn.Linear(128, 64)})
    overrides = {"*embed*": {"bits": [8, 8]}, "*": {"bits": [2, 2]}}
    optimizer = SoloAdamW(model.named_parameters(), overrides=overrides)
    optimizer.initialize_state()
    bytes_of = {name: sum(t.nbytes for t in optimizer.state[p].values()) for _, name, p in optimizer.named_params()}
    assert bytes_of["embed.weight"] == 64 * 128 * 2 + 64 * 12 + 4
    assert bytes_of["head.weight"] == 64 * 128 // 2 + 64 * 12 + 4
    assert bytes_of["head.bias"] == 64 * 8 + 4
    assert (
        save_and_load(optimizer.state_dict())["param_groups"][0]["overrides"] == optimizer.param_groups[0]["overrides"]
    )


def test_seed_and_name_choose_the_noise() -> None:
    ends = {}
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(32, 128))
        optimizer = SoloAdamW([(name, param)], min_numel=0, seed=seed)
        run(param, optimizer, range(3))
        ends[name, seed] = param.detach()
    assert not torch.equal(ends["a", 0], ends["a", 1])
    assert not torch.equal(ends["a", 0], ends["b", 0])


@pytest.mark.parametrize(("dtype", "lr", "steps"), [(torch.bfloat16, 1e-3, 105), (torch.float16, 2e-4, 200)])
def test_half_precision_weights_feel_a_decay_below_their_resolution(dtype: torch.dtype, lr: float, steps: int) -> None:
    for stochastic, expected in ((True, (1 - lr) ** steps), (False, 1.0)):
        param = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = SoloAdamW([param], lr=lr, weight_decay=1.0, bf16_stochastic_rounding=stochastic)
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
        ("bits", (4, 5)),
        ("bits", (4,)),
        ("block_size", 100),
        ("block_size", 0),
        ("quantile", 1.0),
        ("quantile", -0.1),
        ("reference_bits", 1),
        ("min_numel", -1),
        ("overrides", {"*": {"lr": 1}}),
        ("overrides", {"*": {"bits": [1, 2]}}),
    ],
)
def test_bad_arguments_are_named_with_value_and_range(argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=argument):
        make(**{argument: value})


def test_a_group_added_later_without_names_is_taken() -> None:
    """What Lightning's fine-tuning callbacks do when they unfreeze a part."""
    param, optimizer = make()
    added = nn.Parameter(torch.ones(4, 128))
    optimizer.add_param_group({"params": added, "lr": 0.1})
    run(param, optimizer, range(1))
    added.grad = torch.ones_like(added)
    optimizer.step()
    assert (added < 1).all()
    assert optimizer.param_groups[1]["param_names"] == ["group1.0"]


def test_overrides_without_names_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="named_parameters"):
        SoloAdamW([nn.Parameter(torch.zeros(2, 2))], overrides={"*embed*": {"bits": [8, 8]}})


def test_sparse_and_complex_parameters_are_refused() -> None:
    param, optimizer = make()
    param.grad = torch.eye(16, 128).to_sparse()
    with pytest.raises(InvalidArgumentError, match="sparse=False"):
        optimizer.step()
    with pytest.raises(InvalidArgumentError, match="complex"):
        SoloAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_it_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    inputs, targets = torch.randn(256, 64), torch.randn(256, 64)
    optimizer = SoloAdamW(model.named_parameters(), lr=1e-2, min_numel=0, bits=(2, 2))
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
