"""Stochastic rounding to bf16: unbiased, exact where it can be, harmless to what is not finite."""

import torch

from lowbit_lightning.kernels.philox import draw_16bit
from lowbit_lightning.kernels.stochastic_rounding import round_to_bf16


def test_mean_of_many_roundings_is_the_value() -> None:
    draws = draw_16bit(0, 0, 0, torch.arange(8192))
    for value in (1.001, -3.3e-5, 7.9e8):
        rounded = round_to_bf16(torch.full((65536,), value), draws).double()
        assert abs(rounded.mean() / value - 1) < 2e-5
        assert rounded.unique().numel() == 2


def test_representable_values_never_change() -> None:
    values = torch.randn(4096).bfloat16()
    assert torch.equal(round_to_bf16(values.float(), torch.full((4096,), 65535, dtype=torch.int32)), values)


def test_non_finite_values_pass_through() -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = round_to_bf16(values, torch.full((3,), 65535, dtype=torch.int32))
    assert torch.equal(rounded.isnan(), torch.tensor([False, False, True]))
    assert rounded[:2].tolist() == values[:2].tolist()
