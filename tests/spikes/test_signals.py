"""What is measured: norms in fp32, of every kind of tensor, and samples that cost little."""

import math

import pytest
import torch

from lowbit_lightning.spikes.signals import UpdateSample, as_integers, gather_rows, global_norm, pack, sample_ids

CPU = torch.device("cpu")


def norm(*tensors: torch.Tensor | None, copies: int = 1) -> tuple[float, int]:
    found = global_norm(tensors, copies, CPU)
    assert found is not None
    return float(found[0]), int(found[1])


def test_norm_is_that_of_all_tensors_together() -> None:
    assert norm(torch.tensor([3.0]), None, torch.tensor(4.0), torch.zeros(0)) == (5.0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_short_floats_is_accumulated_in_fp32(dtype: torch.dtype) -> None:
    gradient = torch.full((4096,), 300.0, dtype=dtype)  # its sum of squares is beyond fp16, and beyond bf16's 8 bits
    assert norm(gradient)[0] == pytest.approx(300.0 * 64, rel=2e-3 if dtype == torch.bfloat16 else 1e-6)


def test_norm_of_dtypes_mixed() -> None:
    mixed = [torch.tensor([2.0]), torch.tensor([2.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.bfloat16)]
    assert norm(*mixed, torch.tensor([2.0j])) == (pytest.approx(4.0), 0)


def test_norm_of_a_sparse_gradient() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (5,), check_invariants=True)
    assert norm(sparse) == (3.0, 0)


def test_tensors_that_are_not_finite_are_counted() -> None:
    found, bad = norm(torch.tensor([math.nan]), torch.tensor([math.inf, 1.0]), torch.ones(3))
    assert not math.isfinite(found)
    assert bad == 2


def test_copies_share_one_count() -> None:
    assert math.hypot(*[norm(torch.tensor([3.0, 4.0]), copies=4)[0]] * 4) == pytest.approx(5.0)


def test_no_gradient_has_no_norm() -> None:
    assert global_norm([None], 1, CPU) is None


def test_a_row_keeps_every_value() -> None:
    (row,) = gather_rows(pack([1.5, torch.tensor(math.inf), torch.tensor(3), 1e-300], CPU))
    assert row == [1.5, math.inf, 3.0, 1e-300]


def test_update_sample_sees_the_step() -> None:
    weight = torch.nn.Parameter(torch.full((100, 50), 2.0))
    sample = UpdateSample([weight, torch.nn.Parameter(torch.zeros(0))])
    with torch.no_grad():
        weight += 0.5
    squares = sample.squares()
    assert squares is not None
    assert float(squares[0] / squares[1]) == pytest.approx((0.5 / 2.0) ** 2)


def test_nothing_to_sample() -> None:
    assert UpdateSample([]).squares() is None


def test_ids_of_samples_under_their_usual_names() -> None:
    assert as_integers([sample_ids({"x": 1, "idx": torch.tensor([3, 4])}), sample_ids({"sample_id": [5]})]) == [3, 4, 5]
    assert sample_ids(torch.zeros(2)) is None
    assert as_integers([sample_ids({"id": ["a", "b"]})]) is None
    assert as_integers([]) is None
