"""Two processes that train on different data end with the same bits in every weight and every optimizer state."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.registry import Technique, every_technique
from contract.small_run import differences
from contract.two_ranks import train_on_rank
from two_processes import launch

Ranks = Callable[[Technique], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Gives what both ranks ended with. One launch trains all techniques whose tests were selected."""
    folder = tmp_path_factory.mktemp("ranks")
    calls = [vars(item).get("callspec") for item in request.session.items if item.path == request.path]
    techniques = [call.params["technique"] for call in calls if call is not None]
    launch(train_on_rank, techniques, folder)
    return lambda technique: [torch.load(folder / f"{technique.name}.{rank}.pt") for rank in range(2)]


@every_technique
def test_two_processes_end_with_the_same_bits(technique: Technique, ranks: Ranks) -> None:
    one, other = ranks(technique)
    assert list(differences(one["state"], other["state"])) == []
    assert len(list(differences(one["batches"], other["batches"]))) == len(one["batches"]) > 0
