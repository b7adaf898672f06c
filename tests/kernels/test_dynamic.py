"""The signed dynamic format against the maps of the paper and a brute-force nearest search."""

import pytest
import torch

from lowbit_lightning.kernels.dynamic import decode_dynamic, dynamic_map, dynamic_resolution, encode_dynamic

FOUR_BITS = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]


def test_maps_are_the_papers() -> None:
    assert dynamic_map(2) == pytest.approx([-0.55, 0, 0.55, 1])
    assert dynamic_map(3) == pytest.approx([-0.775, -0.325, -0.055, 0, 0.055, 0.325, 0.775, 1])
    assert dynamic_map(4) == pytest.approx([-v for v in reversed(FOUR_BITS)] + [0, *FOUR_BITS, 1])
    assert len(dynamic_map(8)) == 256
    assert min(v for v in dynamic_map(8) if v > 0) == pytest.approx(5.5e-7)


@pytest.mark.parametrize(
    ("bits", "resolution"),
    [(2, 0.275), (3, 0.135), (4, 0.0675), (5, 0.03375), (6, 0.016875), (7, 0.0084375), (8, 0.00421875)],
)
def test_resolution_is_the_median_half_gap_of_the_paper(bits: int, resolution: float) -> None:
    assert dynamic_resolution(bits) == pytest.approx(resolution)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_value_takes_a_nearest_entry(bits: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(20, 128)
    codes, scale = encode_dynamic(values, bits)
    entries = torch.tensor(dynamic_map(bits))
    best = (values.unsqueeze(-1) - scale.view(-1, 1, 1) * entries).abs().amin(-1)
    error = (values - decode_dynamic(codes, scale, bits)).abs()
    assert torch.allclose(error, best, atol=1e-6)


def test_a_tie_takes_the_upper_entry() -> None:
    codes, _ = encode_dynamic(torch.tensor([[1.0, -0.275, 0.275]]), 2)
    assert codes.tolist() == [[3, 1, 2]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_block_stays_zero(bits: int) -> None:
    codes, scale = encode_dynamic(torch.zeros(2, 16), bits)
    assert torch.equal(decode_dynamic(codes, scale, bits), torch.zeros(2, 16))
