"""Packed codes: nothing lost, nothing wasted, and the layout that saved checkpoints rely on."""

import pytest
import torch

from lowbit_lightning.kernels.packing import pack, packed_length, unpack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("length", [8, 37, 128, 200])
def test_unpack_returns_what_was_packed(bits: int, length: int) -> None:
    codes = (torch.arange(3 * length).view(3, length) * 2654435761 % 2**bits).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, packed_length(length, bits))
    assert torch.equal(unpack(packed, bits, length), codes)


@pytest.mark.parametrize(("bits", "expected"), [(2, 32), (3, 48), (4, 64), (8, 128)])
def test_a_block_takes_exactly_its_bits(bits: int, expected: int) -> None:
    assert packed_length(128, bits) == expected


def test_layout_is_planar_with_the_first_plane_in_the_high_bits() -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    codes[0], codes[4] = 0b1010, 0b0101
    assert pack(codes, 4).tolist() == [0b10100101, 0, 0, 0]
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    word = 0b001_010_011_100_101_110_111_000
    assert pack(codes, 3).tolist() == [word >> 16, word >> 8 & 255, word & 255]
