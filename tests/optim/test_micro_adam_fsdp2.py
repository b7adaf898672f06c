"""Sharded by FSDP2 over two processes, MicroAdam selects per shard: one process's bits where blocks end with shards."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim.micro_adam_ranks import (
    ALIGNED,
    DTYPES,
    SAVED_AT,
    SETTINGS,
    STEPS,
    UNALIGNED,
    gradient,
    make,
    result,
    run,
    work,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from two_processes import launched_once

from lowbit_lightning.errors import CheckpointError
from lowbit_lightning.kernels.micro_adam import dequantize_error, micro_adam_step
from lowbit_lightning.kernels.micro_adam_tensor import MicroAdamTensor, new_state
from lowbit_lightning.kernels.philox import stream_id
from lowbit_lightning.optim import MicroAdam, state_bytes
from lowbit_lightning.optim.micro_adam_settings import hyperparameters

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


launched = launched_once(work)


@pytest.fixture(scope="module")
def ranks(launched: Path) -> list[dict[str, Any]]:
    return [torch.load(launched / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    """The same steps in one process."""
    found = {}
    for name, dtype in DTYPES.items():
        weights, optimizer = make(dtype, sharded=False)
        run(weights, optimizer, range(STEPS))
        found[name] = result(weights, optimizer)
    return found


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    else:
        assert one == other, where


@every_dtype
def test_shards_that_end_on_edges_of_blocks_end_with_the_bits_of_one_process(
    dtype: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for rank in ranks:
        for what in ("weights", "states", "errors", "moments"):
            found, expected = (end[what] for end in (rank[dtype]["end"], single[dtype]))
            for name in ALIGNED:
                assert_same(found[name], expected[name], f"{what} of {name}")


@every_dtype
def test_a_shard_that_ends_within_a_block_is_like_a_parameter_of_its_own(
    dtype: str, ranks: list[dict[str, Any]]
) -> None:
    weights, optimizer = make(DTYPES[dtype], sharded=False)
    end, group = ranks[0][dtype]["end"], optimizer.param_groups[0]
    for name, (rows, columns) in UNALIGNED.items():
        for first in (0, -(-rows // 2)):
            part = slice(first, rows if first else -(-rows // 2))
            param = getattr(weights, name).detach()[part].clone()
            if not param.numel():
                continue
            hyper = hyperparameters(group)
            streams = stream_id(name, "error"), stream_id(name, "weight")
            state = new_state(param.numel(), hyper, param.device, param.device)
            shard = MicroAdamTensor(param, param, state, hyper, *streams, first_element=first * columns)
            for step in range(STEPS):
                whole_gradient = gradient(name, getattr(weights, name), step)
                shard.grad = whole_gradient[part]
                if whole_gradient.isfinite().all() and whole_gradient.abs().amax() < 2.0**60:
                    micro_adam_step([shard])
            assert_same(param, end["weights"][name][part], name)
            assert_same(dequantize_error(shard).view(param.shape), end["errors"][name][part], name)


@every_dtype
def test_a_step_is_skipped_by_all_where_one_sees_a_gradient_that_is_not_finite(
    dtype: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for rank in ranks:
        end = rank[dtype]["end"]
        assert end["skips"] == single[dtype]["skips"] == 3
        steps = {name: int(state["step"]) for name, state in end["states"].items()}
        assert steps == {name: STEPS - (name in ("even", "uneven", "single_row")) for name in steps}


@every_dtype
def test_both_processes_end_with_the_same(dtype: str, ranks: list[dict[str, Any]]) -> None:
    assert_same(ranks[0][dtype]["end"], ranks[1][dtype]["end"])


@every_dtype
@pytest.mark.parametrize("way", ["resumed", "resumed_from_full"])
def test_a_resumed_run_ends_with_the_same_bits(dtype: str, way: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_same(rank[dtype][way], rank[dtype]["end"])


@every_dtype
def test_a_checkpoint_of_two_processes_goes_on_in_one_where_shards_end_on_edges(
    dtype: str, launched: Path, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    weights, optimizer = make(DTYPES[dtype], sharded=False, shapes=ALIGNED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: no process group
        state = {"model": get_model_state_dict(weights), "optimizer": get_optimizer_state_dict(weights, optimizer)}
        dcp.load(state, checkpoint_id=launched / dtype)
    set_model_state_dict(weights, state["model"])
    set_optimizer_state_dict(weights, optimizer, state["optimizer"])
    run(weights, optimizer, range(SAVED_AT, STEPS))
    end = result(weights, optimizer)
    for name in ALIGNED:
        assert_same(end["weights"][name], single[dtype]["weights"][name])
        assert_same(end["states"][name], single[dtype]["states"][name])


def test_a_checkpoint_of_other_shards_is_refused_with_the_numbers_of_processes_that_suit(
    ranks: list[dict[str, Any]],
) -> None:
    assert "'cut', (6, 100), were made in whole blocks of topk_block=256" in ranks[0]["refused"]["state"]
    assert "share a parameter among 1, or" in ranks[0]["refused"]["state"]
    full = ranks[0]["fp32"]["full"]["state"]
    for name, shape in UNALIGNED.items():
        optimizer = MicroAdam([(name, nn.Parameter(torch.zeros(shape)))], **SETTINGS)
        saved = optimizer.state_dict() | {"state": {0: full[name]}}
        with pytest.raises(CheckpointError, match=f"{name}.*2 shards that do not end on the edges.*among 2, or"):
            optimizer.load_state_dict(saved)


def test_the_start_table_says_which_shards_bind_a_run_to_its_number_of_processes(ranks: list[dict[str, Any]]) -> None:
    rows = {detail.rpartition(", ")[2]: tensors for _, tensors, detail in ranks[0]["fp32"]["end"]["rows"]}
    assert rows["2 shards that end within blocks: resume on as many processes"].startswith("3 tensors, 2,944")
    assert rows["global bias correction"].startswith("3 tensors")


def test_other_divisions_and_automatic_density_are_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "parameter 'layer' of shape (8, 192)" in rank["refused"]["columns"]
        assert "along their first dimension" in rank["refused"]["columns"]
        assert "density='auto' looks at whole parameters, 'layer'" in rank["refused"]["automatic"]


def test_states_are_divided_among_processes(ranks: list[dict[str, Any]]) -> None:
    _, optimizer = make(torch.float32, sharded=False)
    optimizer.initialize_state()
    # Counters are everywhere, and the smaller of two shards has as much room as the larger.
    room = sum(rank["fp32"]["bytes"] for rank in ranks)
    assert state_bytes(optimizer) < room < 1.4 * state_bytes(optimizer)


def test_the_compression_of_all_shards_is_told(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    found, expected = ranks[0]["fp32"]["end"]["compression"], single["fp32"]["compression"]
    for name in ALIGNED:
        assert found[name] is None or found[name].selected == expected[name].selected
        assert found[name] is None or found[name].caught == pytest.approx(expected[name].caught)
    assert found["single_row"].selected == expected["single_row"].selected == 51
    for rank in ranks:
        assert 0 < rank["fp32"]["end"]["scalars"]["micro_adam/caught"] < 1
