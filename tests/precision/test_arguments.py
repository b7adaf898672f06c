"""Arguments of FourBitPrecision that are out of range, and company that it cannot work in: refused at the start."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import HalfPrecision

from lowbit_lightning.callbacks import DynamicStashing
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import FZOO
from lowbit_lightning.precision import FourBitPrecision
from lowbit_lightning.precision.four_bit import check_only_precision


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": "fp5"}, "weight='fp5' is unknown; it is one of int4"),
        ({"activation": "int8"}, "activation='int8' is unknown"),
        ({"gradient": "int4"}, "gradient='int4' is unknown; it is one of fp8, fp4"),
        ({"weight": None}, "quantize nothing"),
        ({"group_size": 12}, "group_size=12 is out of range: a multiple of 8"),
        ({"weight": "nvfp4", "group_size": 16}, "group_size=16 has no use: nvfp4 has groups of 16"),
        ({"outliers": -1}, "outliers=-1 is out of range"),
        ({"rounding": "up"}, "rounding='up' is out of range: nearest, stochastic"),
        ({"compute": "16-mixed"}, "compute='16-mixed' is out of range: bf16-mixed"),
        ({"evaluate": "8-bit"}, "evaluate='8-bit' is out of range: 4-bit, master"),
        ({"raised_steps": 0}, "raised_steps=0 is out of range"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        FourBitPrecision(**arguments)


@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.*:UserWarning")
def test_patterns_that_leave_no_layer() -> None:
    trainer = Trainer(
        accelerator="cpu", plugins=[FourBitPrecision(include=["decoder.*"])], logger=False, max_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match="no layer to quantize; the linear layers of BoringModel are layer"):
        trainer.fit(BoringModel())


def test_two_that_decide_what_layers_keep_are_refused() -> None:
    trainer = Trainer(
        accelerator="cpu", plugins=[FourBitPrecision()], callbacks=[DynamicStashing()], logger=False, max_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match="FourBitPrecision and DynamicStashing both decide what"):
        trainer.fit(BoringModel())


def test_a_second_word_on_precision_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="beside FourBitPrecision: set it to null, and compute=bf16-true"):
        check_only_precision([FourBitPrecision()], "bf16-true")
    with pytest.raises(InvalidArgumentError, match="2 precision plugins, FourBitPrecision, HalfPrecision: leave one"):
        check_only_precision([FourBitPrecision(), HalfPrecision()], None)
    check_only_precision(FourBitPrecision(), None)
    check_only_precision(None, "bf16-true")


def test_optimizers_without_gradients_are_refused() -> None:
    model = torch.nn.Linear(8, 8)
    with pytest.raises(InvalidArgumentError, match="the optimizer is FZOO, whose perturbations"):
        FourBitPrecision().connect(model, [FZOO(model.named_parameters(), lr=0.1)], [])
