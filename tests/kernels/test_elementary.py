"""The portable log2 and exp2 against float64, with the error bounds that their file promises."""

import torch

from lowbit_lightning.kernels.elementary import exp2, log2


def test_log2_is_within_its_error_bound() -> None:
    x = torch.cat([torch.logspace(-37, 38, 200_001), torch.linspace(0.5, 2, 200_001)])
    exact = torch.log2(x.double())
    # 7e-7 of the polynomial, and half a unit in the last place of an exponent up to 126.
    assert ((log2(x).double() - exact).abs() <= 7e-7 + exact.abs() * 2**-23).all()


def test_log2_is_exact_at_powers_of_two() -> None:
    exponents = torch.arange(-126, 128)
    assert torch.equal(log2(torch.pow(2.0, exponents.double()).float()), exponents.float())


def test_log2_counts_zero_and_subnormals_as_the_smallest_normal() -> None:
    assert log2(torch.tensor([0.0, 1e-45, 2.0**-126])).tolist() == [-126.0] * 3


def test_exp2_is_within_its_error_bound() -> None:
    y = -torch.linspace(0, 126, 400_001)
    exact = torch.exp2(y.double())
    assert ((exp2(y).double() / exact - 1).abs() < 2.5e-7).all()


def test_exp2_is_exact_at_zero() -> None:
    assert exp2(torch.zeros(3)).tolist() == [1.0] * 3
