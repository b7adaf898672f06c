"""The largest magnitudes of each row, and of equal ones the first."""

import pytest
import torch

from lowbit_lightning.kernels.top_k import top_k


@pytest.mark.parametrize(("length", "k"), [(1, 1), (7, 3), (64, 64), (1000, 11), (65536, 2)])
def test_selects_what_a_stable_sort_does(length: int, k: int) -> None:
    generator = torch.Generator().manual_seed(length)
    values = torch.randint(-4, 5, (5, length), generator=generator).float()  # many ties
    expected = values.abs().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(top_k(values, k), expected)


def test_zeros_of_either_sign_are_equal() -> None:
    assert top_k(torch.tensor([[-0.0, 0.0, -0.0, 1e-45]]), 2).tolist() == [[0, 3]]
