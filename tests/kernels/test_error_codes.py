"""4-bit codes between the bounds of a block."""

import pytest
import torch

from lowbit_lightning.kernels.error_codes import decode_error, encode_error, error_bounds


@pytest.mark.parametrize(("length", "block_size"), [(1, 2), (64, 64), (301, 64), (1000, 6), (10, 256)])
def test_an_error_is_at_most_half_a_level(length: int, block_size: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    low, high = error_bounds(values, block_size)
    codes = encode_error(values, low, high, block_size)
    assert codes.shape == (-(-length // 2),)
    decoded = decode_error(codes, low, high, block_size, length)
    level = ((high.float() - low.float()) / 15).repeat_interleave(block_size)[:length]
    slack = values.abs() * 2.0**-8  # bounds are rounded to bf16
    assert ((decoded - values).abs() <= level / 2 + slack).all()


def test_levels_are_fixed_points() -> None:
    low, high = torch.tensor([-1.0]).bfloat16(), torch.tensor([2.75]).bfloat16()
    levels = low.float() + torch.arange(16) * 0.25
    codes = encode_error(levels, low, high, 16)
    assert codes.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]  # the even element is in the high half
    assert torch.equal(decode_error(codes, low, high, 16, 16), levels)


def test_a_constant_block_is_its_bound() -> None:
    values = torch.full((8,), 0.25)
    low, high = error_bounds(values, 4)
    codes = encode_error(values, low, high, 4)
    assert not codes.any()
    assert torch.equal(decode_error(codes, low, high, 4, 8), values)


def test_stochastic_rounding_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.full((200_000,), 0.3)
    values[0], values[1] = 0.0, 15.0
    low, high = error_bounds(values, 200_000)
    codes = encode_error(values, low, high, 200_000, torch.rand(200_000, generator=generator))
    assert decode_error(codes, low, high, 200_000, 200_000)[2:].mean().item() == pytest.approx(0.3, abs=0.01)
