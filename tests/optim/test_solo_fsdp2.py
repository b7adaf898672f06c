"""Sharded by FSDP2 over two processes, SoloAdamW ends with the bits of one process: weights, states, checkpoints."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim.fsdp2_ranks import (
    DTYPES,
    NONFINITE,
    SAVED_AT,
    SETTINGS,
    SHAPES,
    STEPS,
    WAYS,
    Weights,
    make,
    result,
    run,
    train,
    work,
)
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from two_processes import launched_once

from lowbit_lightning.optim import SoloAdamW, state_bytes

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


launched = launched_once(work)


@pytest.fixture(scope="module")
def ranks(launched: Path) -> list[dict[str, Any]]:
    return [torch.load(launched / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    """The same steps in one process."""
    found = {}
    for name, dtype in DTYPES.items():
        weights, optimizer = make(dtype, sharded=False)
        run(weights, optimizer, range(SAVED_AT))
        moments = {key: optimizer.dequantized_state(param) for key, param in weights.named_parameters()}
        saved = copy.deepcopy(optimizer.state_dict())
        run(weights, optimizer, range(SAVED_AT, STEPS))
        found[name] = {"end": result(weights, optimizer), "moments": moments, "saved": saved}
    return found


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    else:
        assert one == other, where


@every_dtype
def test_two_processes_end_with_the_bits_of_one(
    dtype: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for rank in ranks:
        assert_same(rank[dtype]["end"], single[dtype]["end"])


@every_dtype
def test_a_step_is_skipped_by_all_where_one_sees_a_gradient_that_is_not_finite(
    dtype: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        steps = {name: int(state["step"]) for name, state in rank[dtype]["end"]["states"].items()}
        skips = {name: sum(name == where for _, where, _, _ in NONFINITE) for name in SHAPES}
        assert steps == {name: STEPS - skips[name] for name in SHAPES}
        assert rank[dtype]["end"]["skips"] == len(NONFINITE)


@every_dtype
@pytest.mark.parametrize("way", ["resumed", "resumed_from_full", "resumed_from_plain"])
def test_resume_of_shards_is_bit_exact(
    dtype: str, way: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for rank in ranks:
        assert_same(rank[dtype][way], single[dtype]["end"])


@every_dtype
def test_a_checkpoint_of_two_processes_resumes_in_one(dtype: str, launched: Path, single: dict[str, Any]) -> None:
    weights, optimizer = make(DTYPES[dtype], sharded=False)
    state = {"model": get_model_state_dict(weights), "optimizer": get_optimizer_state_dict(weights, optimizer)}
    with warnings.catch_warnings(action="ignore"):  # of there being no process group
        dcp.load(state, checkpoint_id=launched / dtype)
    set_model_state_dict(weights, state["model"])
    set_optimizer_state_dict(weights, optimizer, state["optimizer"])
    run(weights, optimizer, range(SAVED_AT, STEPS))
    assert_same(result(weights, optimizer), single[dtype]["end"])


@every_dtype
def test_the_full_state_is_that_of_one_process(dtype: str, ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    full = ranks[0][dtype]["full"]["state"]
    for (name, state), expected in zip(full.items(), single[dtype]["saved"]["state"].values(), strict=True):
        assert_same(state, expected, name)


@every_dtype
def test_the_zero_step_before_a_load_changes_no_weight_and_no_moment(dtype: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        after = rank[dtype]["after_zero_step"]
        assert_same(after["weights"], rank[dtype]["start"])
        for state in after["states"].values():
            assert not any(value.any() for key, value in state.items() if key.endswith(("scale", "exp_avg")))


@every_dtype
def test_dequantized_moments_are_those_of_one_process(
    dtype: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for rank, first in zip(ranks, (0, 4), strict=True):
        assert_same(rank[dtype]["moments"], single[dtype]["moments"])
        uneven = single[dtype]["moments"]["uneven"]
        assert_same(rank[dtype]["first_rows"], {key: value[first : first + 2] for key, value in uneven.items()})
        assert torch.equal(rank[dtype]["rows"], uneven["exp_avg"][first : first + 4])


def test_states_are_divided_among_processes(ranks: list[dict[str, Any]]) -> None:
    _, optimizer = make(torch.float32, sharded=False)
    optimizer.initialize_state()
    counters = 4 * len(SHAPES)  # which every process has
    assert sum(rank["fp32"]["bytes"] for rank in ranks) == state_bytes(optimizer) + counters


def test_an_adamw_state_is_taken_over_by_shards(ranks: list[dict[str, Any]]) -> None:
    weights = Weights(torch.float32)
    optimizer = SoloAdamW(weights.named_parameters(), **SETTINGS)
    optimizer.load_state_dict(ranks[0]["adamw"]["full"])
    expected = result(weights, optimizer)["states"]
    for rank in ranks:
        for way in ("by_shards", "by_checkpoint"):
            assert_same(rank["adamw"][way]["states"], expected)


def test_divided_columns_are_refused_by_name_in_low_bits(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "parameter 'even' of shape (8, 200)" in rank["columns"]["error"]
        assert "'even': {'bits': [32, 32]}" in rank["columns"]["error"]


@every_dtype
def test_divided_columns_with_fp32_states_end_with_the_bits_of_one_process(
    dtype: str, ranks: list[dict[str, Any]]
) -> None:
    weights = Weights(DTYPES[dtype])
    optimizer = SoloAdamW(weights.named_parameters(), **(SETTINGS | {"overrides": {}, "bits": (32, 32)}))
    run(weights, optimizer, range(STEPS))
    for rank in ranks:
        assert_same(rank["columns"][dtype], result(weights, optimizer))


def test_partial_gradients_are_summed(ranks: list[dict[str, Any]]) -> None:
    weights, optimizer = make(torch.bfloat16, sharded=False)
    run(weights, optimizer, range(STEPS), nonfinite=False)
    for rank in ranks:
        assert_same(rank["partial"], result(weights, optimizer))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_model_parallel_strategy_resumes_to_the_bits_of_one_process(
    way: tuple[str, bool], ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = train(way, tmp_path)
    assert expected["states"]["net.0.weight"]["exp_avg_codes"].dtype == torch.uint8
    for rank in ranks:
        assert_same(rank["lightning"][way], expected)
