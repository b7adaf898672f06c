"""Forward-only training of PEFT adapters: what is frozen stays as it is, to the bit, a quantized base too."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lowbit_lightning.models import SequenceClassifier
from lowbit_lightning.optim import FZOO
from lowbit_lightning.strategies import ForwardOnlyStrategy

BERT = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TOKENS = torch.randint(0, 40, (16, 5), generator=torch.Generator().manual_seed(4))
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS.sum(1) % 3}
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Int8Linear(nn.Linear):
    """A frozen linear layer of int8 codes and one scale, as a quantized checkpoint has it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        scale = weight.abs().amax() / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.float() * self.scale)


class Losses(Callback):
    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.steps.append(float(loss))


def adapted(quantized: bool, lora: dict[str, Any]) -> SequenceClassifier:
    torch.manual_seed(0)
    module = SequenceClassifier(config=BERT, num_labels=3, lora={"r": 2, "target_modules": ["query", "value"]} | lora)
    module.configure_model()  # makes the head, which Lightning would do later
    if quantized:
        for layer in module.modules():
            for name in ("query", "value") if hasattr(layer, "query") else ():
                wrapped = getattr(layer, name)  # peft's layer around the base layer
                wrapped.base_layer = Int8Linear(wrapped.base_layer.weight.detach())
    return module


def fit(module: SequenceClassifier, execution: str, steps: int) -> list[float]:
    settings: dict[str, Any] = {"perturbation": "rank1", "execution": execution, "lr": 3e-2, "eps": 1e-3}
    module.configure_optimizers = lambda: FZOO(module.named_parameters(), **settings)  # type: ignore[method-assign]
    losses = Losses()
    Trainer(
        strategy=ForwardOnlyStrategy(), accelerator="cpu", max_steps=steps, logger=False, callbacks=[losses],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader([BATCH] * steps, batch_size=None))  # fmt: skip
    return losses.steps


@pytest.mark.parametrize("execution", ["sequential", "batched"])
@pytest.mark.parametrize("quantized", [False, True], ids=["fp32-base", "int8-base"])
def test_adapters_learn_and_the_base_stays_as_it_is(quantized: bool, execution: str) -> None:
    module = adapted(quantized, {})
    before = {name: value.clone() for name, value in module.state_dict().items() if value.numel()}
    losses = fit(module, execution, steps=40)
    moved = {
        name for name, value in module.state_dict().items() if name in before and not torch.equal(value, before[name])
    }
    trainable = {name for name, param in module.named_parameters() if param.requires_grad}
    assert moved == trainable
    assert any("lora_A" in name for name in moved)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_batched_and_sequential_passes_of_adapters_agree() -> None:
    """The second batched step is not made one by one any more, and follows an update from its own losses."""
    modules = [adapted(False, {}), adapted(False, {})]
    sequential, batched = (
        fit(module, execution, 3) for module, execution in zip(modules, ("sequential", "batched"), strict=True)
    )
    assert sequential == pytest.approx(batched, rel=1e-5)
    states = [module.state_dict() for module in modules]
    assert all(torch.allclose(value, states[1][name], atol=1e-4) for name, value in states[0].items())


def test_dora_reads_the_base_weight_and_trains() -> None:
    losses = fit(adapted(False, {"use_dora": True}), "sequential", steps=12)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
