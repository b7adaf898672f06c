"""What each of two processes does in the test of DynamicStashing's levels under distributed data parallel training."""

import os
import warnings
from pathlib import Path

import torch
from callbacks.precision_run import FLAT, IMPROVING, LEVELS, LevelOfSteps, Net, trainer

from lowbit_lightning.callbacks import DynamicStashing
from lowbit_lightning.errors import InvalidArgumentError


def on_rank(rank: int, folder: Path, port: int) -> None:
    """Write what came of three runs: a metric that differs between ranks, a bound on the error, a missing metric."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }  # fmt: skip
    two = {"strategy": "ddp", "devices": 2}
    # The metric of rank 1 improves and that of rank 0 does not: one of them has to decide.
    net, stashing = Net(IMPROVING if rank else FLAT), DynamicStashing(levels=LEVELS)
    seen = LevelOfSteps(stashing)
    trainer(stashing, seen, **two).fit(net)
    bounded = DynamicStashing(levels=LEVELS, max_gradient_error=0.2)
    seen_bounded = LevelOfSteps(bounded)
    trainer(bounded, seen_bounded, steps=4, **two).fit(Net(IMPROVING))
    message = ""
    try:
        trainer(DynamicStashing(levels=LEVELS), **two).fit(Net(name="val_loss" if rank else "other"))
    except InvalidArgumentError as error:
        message = str(error)
    torch.save([seen.seen, seen_bounded.seen, net.state_dict(), message], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
