"""Sharded by FSDP2 over two processes, a stash gives the weights of one process, and keeps no whole weights."""

from pathlib import Path

import pytest
import torch
from sharded import WAYS
from stash.stash_ranks import train, work
from two_processes import launched_once

launched = launched_once(work)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_end_with_the_weights_of_one(way: str, launched: Path, tmp_path: Path) -> None:
    single = train(way, tmp_path, sharded=False)
    for rank in range(2):
        sharded = torch.load(launched / f"{rank}.pt")[way]
        for name, weight in single["weights"].items():
            assert torch.allclose(sharded["weights"][name], weight, rtol=1e-3, atol=1e-5), name
        packed, expected = (found["metrics"]["stash/packed_mb"] for found in (sharded, single))
        if way == "layers":
            assert packed == pytest.approx(expected, rel=0.01)
        else:  # a norm that is sharded by itself cannot be run again for its neighbours, nor can logits be recomputed
            assert expected < packed < 4 * expected
