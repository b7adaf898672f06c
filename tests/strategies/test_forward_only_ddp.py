"""Two processes that exchange losses only stay equal to the last bit, and equal to one with all of the data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from strategies.two_ranks import train_on_rank
from two_processes import launch

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.strategies import ForwardOnlyDDPStrategy

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder: Path = tmp_path_factory.mktemp("ranks")
    launch(train_on_rank, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_processes_are_bit_identical_after_200_steps_on_different_data(ranks: Found) -> None:
    assert_same_bits(ranks[0]["long"], ranks[1]["long"])
    assert not torch.equal(ranks[0]["batches"][0], ranks[1]["batches"][0])
    assert ranks[0]["routes"] == ranks[1]["routes"] == [0, 1]


def test_all_start_from_process_0_and_what_nobody_uses_stays_there(ranks: Found) -> None:
    start, end = ranks[0]["start"], ranks[1]["long"]
    same = [name for name in start if torch.equal(start[name], end[name])]
    assert same == ["experts.2.weight", "experts.2.bias", "never.weight", "never.bias"]


def test_resume_is_bit_exact(ranks: Found) -> None:
    for found in ranks:
        assert_same_bits(found["straight"], found["resumed"])


def test_two_processes_make_the_steps_of_one_with_all_of_the_data(ranks: Found) -> None:
    assert ranks[0]["alone"].pop("mean") != ranks[0]["together"]["mean"]  # of process 0's share
    for name, value in ranks[0]["alone"].items():
        assert torch.allclose(value.float(), ranks[0]["together"][name].float(), atol=1e-4), name


def test_a_process_that_drifts_away_is_found(ranks: Found) -> None:
    for found in ranks:
        assert found["message"].startswith("parameter 'experts.1.weight' differs between process 0 and process 1")


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="digest_every_n_steps=-1 is out of range"):
        ForwardOnlyDDPStrategy(digest_every_n_steps=-1)
