"""Signs are fair, independent and addressable; perturbing and updating are exact, and rounded without bias."""

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels.philox import philox_4x32
from lowbit_lightning.kernels.rademacher import (
    Noise,
    Update,
    apply_update_reference,
    perturbed_copy_reference,
    perturbed_rows_reference,
    rank1_signs,
    sign_tensor,
    signs,
)
from lowbit_lightning.kernels.stochastic_rounding import round_to_fp16

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def noise(step: int = 3, **changes: object) -> Noise:
    return Noise(**({"seed": 5, "sign_stream": 11, "weight_stream": 22, "step": step} | changes))  # type: ignore[arg-type]


def test_signs_are_the_bits_of_philox_in_order() -> None:
    zero = torch.zeros((), dtype=torch.int64)
    words = philox_4x32((zero + 1, zero, zero + 3, zero + 6), (5, 11))  # call 1, step 3, perturbation 6
    bits = [int(words[element // 32]) >> (element % 32) & 1 for element in range(128)]
    assert signs(128, noise(), 6, first=128).tolist() == [1.0 - 2.0 * bit for bit in bits]


def test_any_part_has_the_signs_of_the_whole() -> None:
    whole = signs(1000, noise(), 0)
    for first, numel in [(0, 1), (127, 2), (128, 500), (333, 667)]:
        assert torch.equal(signs(numel, noise(), 0, first), whole[first : first + numel])


def test_signs_have_mean_zero_and_variance_one() -> None:
    drawn = signs(1_000_000, noise(), 0)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert abs(drawn.mean()) < 4e-3  # four standard deviations


def test_perturbations_steps_streams_and_seeds_are_uncorrelated() -> None:
    sources = [(noise(step), index) for step in (0, 1, 2) for index in (0, 1, 7)]
    sources += [(noise(sign_stream=12), 0), (noise(seed=6), 0)]
    drawn = torch.stack([signs(100_000, source, index) for source, index in sources])
    correlation = drawn @ drawn.T / drawn.shape[1] - torch.eye(len(sources))
    assert correlation.abs().max() < 4.5 * 100_000**-0.5


def test_neighbours_at_any_distance_are_uncorrelated() -> None:
    drawn = signs(200_000, noise(), 0)
    for distance in (1, 2, 31, 32, 64, 127, 128, 4096):
        assert abs((drawn[distance:] * drawn[:-distance]).mean()) < 4.5 * 200_000**-0.5, distance


@pytest.mark.parametrize("size", [32, 64, 128])
def test_sign_matrices_have_full_rank(size: int) -> None:
    """A hash whose low bits are linear in row and column gives a checkerboard of rank one."""
    matrix = sign_tensor(torch.empty(size, size), noise(), 0)
    assert torch.linalg.matrix_rank(matrix.double()) == size


def test_rank1_signs_have_rank_one_and_independent_factors() -> None:
    r, s = rank1_signs(64, 128, noise(), 0)
    matrix = sign_tensor(torch.empty(64, 2, 8, 8), noise(rank1=True), 0).view(64, 128)
    assert torch.equal(matrix, torch.outer(r, s))
    assert torch.linalg.matrix_rank(matrix) == 1
    assert len({tuple(rank1_signs(64, 128, noise(), index)[0].tolist()) for index in range(64)}) == 64


def test_rank1_estimates_have_the_mean_and_variance_of_full_ones() -> None:
    gradient = torch.randn(6, 10)
    for rank1 in (False, True):
        drawn = torch.stack([sign_tensor(gradient, noise(rank1=rank1), index) for index in range(4000)])
        slopes = (drawn * gradient).sum((1, 2))
        estimates = slopes[:, None, None] * drawn
        assert torch.allclose(estimates.mean(0), gradient, atol=5 * gradient.norm() / 4000**0.5)
        assert abs(slopes.square().mean() / gradient.square().sum() - 1) < 0.15
        assert torch.allclose(estimates.square().mean(0), gradient.square().sum(), rtol=0.15)


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (3, 50), (70, 130), (8, 3, 5, 5), (0, 4)])
def test_perturbed_copy_adds_eps_times_the_signs(shape: tuple[int, ...], rank1: bool) -> None:
    param, source = filled(shape, torch.float32), noise(rank1=rank1 and len(shape) > 1)
    expected = param + 1e-3 * sign_tensor(param, source, 2)
    assert torch.equal(perturbed_copy_reference(param, 1e-3, source, 2, torch.empty_like(param)), expected)
    opposite = perturbed_copy_reference(param, -1e-3, source, 2, torch.empty_like(param))
    assert torch.equal(opposite, param - 1e-3 * sign_tensor(param, source, 2))


def test_perturbed_copy_keeps_the_memory_format() -> None:
    param = filled((8, 4, 3, 3), torch.float32).to(memory_format=torch.channels_last)
    out = perturbed_copy_reference(param, 1e-2, noise(), 0, torch.empty_like(param))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, param + 1e-2 * sign_tensor(param, noise(), 0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("columns", [5, 128, 200])
def test_perturbed_rows_are_rows_of_the_perturbed_copy(columns: int, rank1: bool, dtype: torch.dtype) -> None:
    weight, source = filled((60, columns), dtype), noise(rank1=rank1)
    rows = torch.tensor([[3, 59, 0], [3, 17, 17]])
    whole = perturbed_copy_reference(weight, 1e-3, source, 4, torch.empty_like(weight))
    assert torch.equal(perturbed_rows_reference(weight, rows, 1e-3, source, 4), whole[rows])


@pytest.mark.parametrize("rank1", [False, True])
def test_update_is_the_weighted_sum_of_all_perturbations(rank1: bool) -> None:
    param, source, sizes = filled((70, 1300), torch.float32), noise(rank1=rank1), (0.5, -0.25, 0.125)
    moved = sum(size * sign_tensor(param, source, index) for index, size in enumerate(sizes))
    expected = param * 0.75 - moved
    apply_update_reference(Update(param, source, sizes, 0.75))
    assert torch.equal(param, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_of_16_bit_weights_arrive_in_expectation(dtype: torch.dtype) -> None:
    param = torch.full((200_000,), 1.0, dtype=dtype)
    apply_update_reference(Update(param, noise(), (1e-4,), 1.0))
    drawn = sign_tensor(param, noise(), 0)
    assert abs(((param.double() - 1) * drawn).mean() + 1e-4) < 1.2e-5
    nearest = torch.full((1000,), 1.0, dtype=dtype)
    apply_update_reference(Update(nearest, noise(stochastic_rounding=False), (1e-4,), 1.0))
    assert torch.equal(nearest, torch.ones_like(nearest))


@pytest.mark.parametrize("value", [0.3, 3e-5, 4e-8, 65000.0, -0.3, -3e-5])
def test_fp16_rounding_is_unbiased_and_keeps_what_it_can_represent(value: float) -> None:
    draws = torch.arange(65536, dtype=torch.int32)
    rounded = round_to_fp16(torch.full((65536,), value), draws).double()
    assert len(rounded.unique()) <= 2
    assert abs(rounded.mean() / torch.tensor(value).double() - 1) < 1e-6 + 2**-14 * 6e-8 / abs(value)
    exact = torch.tensor(value).half().float().expand(65536)
    assert torch.equal(round_to_fp16(exact.contiguous(), draws), exact.half())
