"""Sharded over two processes, Stable-SPAM clips and normalizes by the maximum and the norm of the whole tensor."""

from typing import Any

import pytest
import torch
from optim.stable_spam_ranks import SETTINGS, STEPS, Weights, result, run, stabilized, work
from two_processes import launch

from lowbit_lightning.optim import StableSPAM

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes did, which all tests look at."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def single(dtype: torch.dtype) -> dict[str, Any]:
    """The same steps in one process."""
    weights = Weights(dtype)
    optimizer = StableSPAM(weights.named_parameters(), **SETTINGS)
    run(weights, optimizer, range(STEPS))
    return result(weights, optimizer)


def assert_close(one: dict[str, Any], other: dict[str, Any], dtype: torch.dtype) -> None:
    # Sums in another order; a bf16 weight on the edge of its rounding may fall either way.
    for name, weight in other["weights"].items():
        close = torch.isclose(one["weights"][name].float(), weight.float(), rtol=0, atol=1e-5)
        assert close.float().mean() >= (1.0 if dtype == torch.float32 else 0.97), name
        for key, value in other["states"][name].items():
            assert torch.allclose(one["states"][name][key], value, rtol=1e-4, atol=1e-6), (name, key)
    assert one["skips"] == other["skips"] == 1


@every_dtype
def test_two_processes_end_where_one_does(dtype: torch.dtype, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_close(rank[str(dtype)], single(dtype), dtype)


@every_dtype
def test_a_whole_state_resumes_to_the_same_bits(dtype: torch.dtype, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        straight, resumed = rank[str(dtype)], rank[f"resumed {dtype}"]
        for kind in ("weights", "states"):
            assert straight[kind].keys() == resumed[kind].keys()
        assert all(torch.equal(value, resumed["weights"][name]) for name, value in straight["weights"].items())
        for name, state in straight["states"].items():
            assert all(torch.equal(value, resumed["states"][name][key]) for key, value in state.items()), name


def test_parameters_may_be_divided_by_columns(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_close(rank["columns"], single(torch.bfloat16), torch.bfloat16)


def test_rules_see_whole_tensors(ranks: list[dict[str, Any]]) -> None:
    alone = stabilized(Weights(torch.float32))
    for rank in ranks:
        for step, (one, other) in enumerate(zip(rank["rules"], alone, strict=True)):
            for name, grad in other.items():
                assert torch.allclose(one[name], grad, rtol=1e-5, equal_nan=True), (step, name)


def test_sums_that_are_still_partial_are_summed(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["partial"]["norms"].item() == pytest.approx(6.0 * 24**0.5)
        assert torch.equal(rank["partial"]["grad"], torch.full((4, 6), 6.0))
