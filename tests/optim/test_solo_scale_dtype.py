"""Block scales in bf16: their bytes, that rounding them swamps nothing, and what a checkpoint of them is taken for."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.optim import SoloAdamW, state_bytes

SCALES = ("exp_avg_scale", "exp_avg_sq_scale", "exp_avg_sq_log2_base")


def make(rows: int = 16, **settings: Any) -> tuple[nn.Parameter, SoloAdamW]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(rows, 128))
    return param, SoloAdamW([("weight", param)], **({"min_numel": 0, "scale_dtype": "bf16"} | settings))


def run(param: nn.Parameter, optimizer: SoloAdamW, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        param.grad = torch.randn(param.shape)
        optimizer.step()


def second_moment(param: nn.Parameter, optimizer: SoloAdamW) -> Tensor:
    return optimizer.dequantized_state(param)["exp_avg_sq"]


@pytest.mark.parametrize(("bits", "limit"), [((4, 2), 0.80), ((2, 2), 0.55)])
def test_state_takes_no_more_bytes_than_promised(bits: tuple[int, int], limit: float) -> None:
    param, optimizer = make(256, bits=bits)
    optimizer.initialize_state()
    assert all(optimizer.state[param][key].dtype == torch.bfloat16 for key in SCALES)
    assert state_bytes(optimizer) / param.numel() <= limit


@pytest.mark.parametrize("bits", [(4, 2), (4, 4), (8, 8)])
def test_a_state_without_gradient_decays_at_the_true_rate(bits: tuple[int, int]) -> None:
    """A maximum rounded to the nearest bf16 would never decay: a step moves it by a quarter of half a unit."""
    param, optimizer = make(64, bits=bits)
    run(param, optimizer, range(2))
    start = second_moment(param, optimizer).log2().mean()
    for _ in range(1000):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    fall = start - second_moment(param, optimizer).log2().mean()
    assert fall == pytest.approx(1000 * -math.log2(0.999), rel=0.1)


@pytest.mark.parametrize("bits", [(4, 2), (4, 4), (8, 8)])
def test_elements_without_gradient_decay_beside_others_that_have_one(bits: tuple[int, int]) -> None:
    """The maximum stays, so it is log2_base that must follow: rounded to the nearest it would hold the last level."""
    param, optimizer = make(64, bits=bits)
    param.grad = torch.ones_like(param)
    optimizer.step()
    start = second_moment(param, optimizer)[:, ::2].log2().mean()
    for _ in range(1000):
        param.grad = torch.ones_like(param)
        param.grad[:, ::2] = 0
        optimizer.step()
    fall = start - second_moment(param, optimizer)[:, ::2].log2().mean()
    assert fall == pytest.approx(1000 * -math.log2(0.999), rel=0.1)


def test_zero_blocks_stay_zero_and_constant_ones_stay_constant_to_bf16() -> None:
    param, optimizer = make(2, lr=0.0)
    for step in range(1, 51):
        param.grad = torch.stack([torch.zeros(128), torch.full((128,), 3.7e-4)])
        optimizer.step()
        zero, constant = second_moment(param, optimizer)
        assert not zero.any()
        assert (constant == constant[0]).all()
        assert constant[0].item() == pytest.approx((1 - 0.999**step) * 3.7e-4**2, rel=0.05)
    assert not optimizer.dequantized_state(param)["exp_avg"][0].any()


def test_resume_is_bit_exact_and_keeps_bf16_scales() -> None:
    param, optimizer = make()
    run(param, optimizer, range(3))
    weights, saved = param.detach().clone(), copy.deepcopy(optimizer.state_dict())
    run(param, optimizer, range(3, 6))
    resumed, fresh = make()
    resumed.data.copy_(weights)
    fresh.load_state_dict(saved)
    assert all(fresh.state[resumed][key].dtype == torch.bfloat16 for key in SCALES)
    run(resumed, fresh, range(3, 6))
    assert torch.equal(param, resumed)
    for key, value in optimizer.state[param].items():
        assert torch.equal(value, fresh.state[resumed][key])


@pytest.mark.parametrize(("saved", "asked"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_checkpoint_with_other_scales_is_refused_by_name(saved: str, asked: str) -> None:
    param, optimizer = make(scale_dtype=saved)
    run(param, optimizer, range(1))
    with pytest.raises(CheckpointError, match=f"scale_dtype='{saved}'.*scale_dtype='{asked}'"):
        make(scale_dtype=asked)[1].load_state_dict(optimizer.state_dict())


def test_a_checkpoint_from_before_the_option_goes_on_with_fp32_scales() -> None:
    param, optimizer = make(scale_dtype="fp32")
    run(param, optimizer, range(1))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["scale_dtype"]
    resumed, fresh = make(scale_dtype="fp32")
    fresh.load_state_dict(saved)
    assert fresh.state[resumed]["exp_avg_scale"].dtype == torch.float32


def test_a_torch_adamw_checkpoint_is_taken_over() -> None:
    param, optimizer = make(bits=(8, 8))
    theirs = torch.optim.AdamW([param])
    param.grad = torch.randn(param.shape)
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    expected = theirs.state[param]["exp_avg_sq"]
    floor = torch.quantile(expected, 0.1, dim=-1, keepdim=True)
    # Half a unit of D, and of log2_base 255 times: bf16 scales are made for fewer bits.
    assert torch.allclose(second_moment(param, optimizer), expected.maximum(floor), rtol=0.04)


def test_another_value_is_named_with_what_is_allowed() -> None:
    with pytest.raises(InvalidArgumentError, match="scale_dtype='fp16' is out of range: one of fp32, bf16"):
        make(scale_dtype="fp16")
    with pytest.raises(InvalidArgumentError, match="a parameter group of its own"):
        make(overrides={"*": {"scale_dtype": "bf16"}})
