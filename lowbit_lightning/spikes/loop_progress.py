"""Lightning's counters of batches, steps and epochs, taken and put back between two hooks.

``loop.load_state_dict`` would mark the loops as restarting and so change their course; the counters are set one by one.
Counters of optimization (``global_step``, scheduler steps) belong to the weights. Counters of batches and epochs belong
to the data and go back only with it.
"""

import copy
from typing import Any, Literal

from lightning.pytorch import Trainer


def capture(trainer: Trainer, before_first_batch: bool) -> dict[str, Any]:
    """Returns all counters as a hook of a batch's end sees them.

    Args:
        trainer: The trainer of the loops.
        before_first_batch: Called in ``on_train_batch_start``: give what the end of a batch before would have seen.

    """
    epoch_loop = trainer.fit_loop.epoch_loop
    state: dict[str, Any] = {
        "steps": [copy.deepcopy(progress.state_dict()) for progress in _of_steps(trainer)],
        "position": [copy.deepcopy(progress.state_dict()) for progress in _of_position(trainer)],
        "stepped": epoch_loop._batches_that_stepped,
        "before_first_batch": before_first_batch,
    }
    if before_first_batch:
        batches = state["position"][0]
        for counts in (batches["total"], batches["current"]):
            counts["ready"] -= 1  # this batch is not taken yet
            counts["completed"] -= 1  # and the loop will complete one more after the hook
        batches["is_last_batch"] = False
        state["stepped"] -= 1
    return state


def restore(trainer: Trainer, state: dict[str, Any], *, position: bool, axis: Literal["rewind", "monotonic"]) -> None:
    """Puts the counters back.

    Args:
        trainer: The trainer of the loops.
        state: What ``capture`` returned.
        position: Whether batches and epochs go back too.
        axis: Whether the step that loggers see goes back too.

    """
    epoch_loop = trainer.fit_loop.epoch_loop
    for progress, saved in zip(_of_steps(trainer), state["steps"], strict=True):
        progress.load_state_dict(copy.deepcopy(saved))
    if axis == "rewind":
        epoch_loop._batches_that_stepped = state["stepped"]
    if position:
        for progress, saved in zip(_of_position(trainer), state["position"], strict=True):
            progress.load_state_dict(copy.deepcopy(saved))
    if state["before_first_batch"] and (position or epoch_loop._batches_that_stepped < 0):
        # No batch precedes the first one, so no validation follows it; loggers have no step for one either.
        epoch_loop._skip_next_val = True


def _of_steps(trainer: Trainer) -> list[Any]:
    loop = trainer.fit_loop.epoch_loop
    return [
        loop.automatic_optimization.optim_progress,
        loop.manual_optimization.optim_step_progress,
        loop.scheduler_progress,
    ]


def _of_position(trainer: Trainer) -> list[Any]:
    loop = trainer.fit_loop.epoch_loop
    return [loop.batch_progress, trainer.fit_loop.epoch_progress, loop.val_loop.batch_progress]
