"""SpikeMonitor and SpikeGuard on a run without gradients: they are told of losses that only perturbed passes saw."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import SpikeGuard, SpikeMonitor
from lowbit_lightning.optim import FZOO, MeZO
from lowbit_lightning.strategies import ForwardOnlyStrategy

STEPS, BAD = 24, 20


class Net(LightningModule):
    """Gives a loss that is not finite, in the clean pass or in a perturbed one of one step."""

    def __init__(self, optimizer: Any, pass_number: int) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.make, self.pass_number = optimizer, pass_number

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        PASSES.append(batch_idx)
        loss = cross_entropy(self.head(batch[0]), batch[1])
        return loss * math.inf if batch_idx == BAD and PASSES.count(BAD) == self.pass_number else loss

    def configure_optimizers(self) -> Any:
        return self.make(self.named_parameters())


PASSES: list[int] = []


@pytest.mark.parametrize(
    ("make", "pass_number"),
    [
        (lambda params: FZOO(params, lr=1e-2, num_perturbations=4), 1),
        (lambda params: FZOO(params, lr=1e-2, num_perturbations=4), 3),
        (lambda params: MeZO(params, lr=1e-2), 2),
    ],
    ids=["clean", "perturbed", "mezo"],
)
def test_a_nonfinite_loss_is_an_event_and_the_step_is_left_out(
    make: Any, pass_number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    PASSES.clear()
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(STEPS)]
    callbacks = [SpikeMonitor(min_samples=4), SpikeGuard(ladder=["skip"])]
    run = Trainer(
        strategy=ForwardOnlyStrategy(), accelerator="cpu", max_steps=STEPS, logger=False, callbacks=callbacks,
        default_root_dir=tmp_path, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        run.fit(Net(make, pass_number), DataLoader(data, batch_size=None))
    events = [record.getMessage() for record in caplog.records if "spike at step" in record.getMessage()]
    assert len(events) == 1
    assert events[0].startswith(f"spike at step {BAD} ")
    assert events[0].endswith("skip: the step is left out")
    assert run.global_step == STEPS
