"""FourBitPrecision: straight-through gradients, what is really kept for backward, and a module left as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from lowbit_lightning.precision import FourBitPrecision
from lowbit_lightning.precision.straight_through import quantize_weight
from lowbit_lightning.spikes.remedies import Remedies


class Attention(nn.Module):
    """Query, key and value of one input, and a projection."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.q(x) * self.k(x) + self.v(x))
        return result


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.net = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
        self.lm_head = nn.Linear(32, 16, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.lm_head(self.net(self.embed(tokens)))
        return result

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def converted(module: nn.Module, **arguments: Any) -> FourBitPrecision:
    plugin = FourBitPrecision(**{"compute": "32-true", **arguments})
    plugin.convert_module(module)
    return plugin


def fit(plugin: Any, steps: int = 4, module: Module | None = None, **trainer: Any) -> tuple[Trainer, Module]:
    torch.manual_seed(0)
    module = module or Module()
    made = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[plugin], num_sanity_val_steps=0, **trainer,
    )  # fmt: skip
    tokens: Any = torch.randint(16, (8 * steps, 12), generator=torch.Generator().manual_seed(0))
    made.fit(module, DataLoader(tokens, batch_size=8), DataLoader(tokens[:8], batch_size=8))
    return made, module


def kept_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that autograd keeps for backward, each storage once, without the parameters."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storages.values())


@pytest.mark.parametrize(
    "arguments", [{"weight": "int4"}, {"weight": "fp4", "activation": "nvfp4"}, {"weight": None, "activation": "int3"}]
)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_gradients_are_those_of_finite_differences_straight_through(arguments: dict[str, Any], kind: type) -> None:
    """The straight-through loss moves with the operands as if what rounding adds to them were constant."""
    layer = (nn.Linear(40, 24) if kind is nn.Linear else Conv1D(24, 40)).double()
    converted(layer, group_size=16, **arguments)
    x, direction = torch.randn(3, 5, 40, dtype=torch.float64), torch.randn(3, 5, 24, dtype=torch.float64)
    x.requires_grad_()
    loss = (layer(x) * direction).sum()
    loss.backward()

    how = layer.forward.__self__.how
    transposed = kind is Conv1D
    with torch.no_grad():
        weight = layer.weight.t() if transposed else layer.weight
        quantized_weight = quantize_weight(layer.weight, how, torch.float64, None)
        eye = nn.Linear(40, 40, bias=False).double()
        eye.weight.copy_(torch.eye(40))
        scheme = how.activation.scheme
        own = scheme.format == "nvfp4"
        converted(eye, group_size=None if own else 16, weight=None, activation=scheme.format)
        quantized_x = eye(x)

        def surrogate(x_: Tensor, weight_: Tensor, bias: Tensor) -> float:
            left, right = x_ + (quantized_x - x), weight_ + (quantized_weight - weight)
            return float(((left @ right.t() + bias) * direction).sum())

        assert surrogate(x, weight, layer.bias) == pytest.approx(float(loss), rel=1e-9)
        operands = [x.detach(), weight, layer.bias]
        gradients = [x.grad, layer.weight.grad.t() if transposed else layer.weight.grad, layer.bias.grad]
        for index, (operand, gradient) in enumerate(zip(operands, gradients, strict=True)):
            change = torch.randn_like(operand) * 1e-3
            ends = [
                surrogate(*(one + sign * change if i == index else one for i, one in enumerate(operands)))
                for sign in (1, -1)
            ]
            assert (ends[0] - ends[1]) / 2 == pytest.approx(float((gradient * change).sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "most"),
    [({"weight": "int4"}, 0.28), ({"weight": "nvfp4"}, 0.29), ({"weight": "int4", "group_size": 128}, 0.30)],
)
def test_activations_kept_for_backward_are_packed(arguments: dict[str, Any], most: float) -> None:
    module = Attention().bfloat16()
    x = torch.randn(4, 64, 256, dtype=torch.bfloat16, requires_grad=True)

    # Products of q(x) and k(x) are kept too, by the multiplication: counted apart, with layers that are frozen.
    def of_layers(module: nn.Module) -> int:
        everything = kept_bytes(lambda: module(x), module)
        frozen = copy.deepcopy(module).requires_grad_(False)
        return everything - kept_bytes(lambda: frozen(x), frozen)

    plain = of_layers(module)
    assert plain == 2 * x.nbytes  # one that query, key and value share, one of the projection
    converted(module, **arguments)
    assert of_layers(module) <= most * plain
    converted(module, save_packed=False, **arguments)
    assert of_layers(module) == plain


def test_what_nobody_needs_is_not_computed() -> None:
    def flops(layer: nn.Module, x: Tensor) -> int:
        y = layer(x)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return counter.get_total_flops()

    layer = nn.Linear(32, 16)
    converted(layer)
    x = torch.randn(8, 32)
    product = 2 * 8 * 32 * 16
    assert flops(layer, x) == product
    assert flops(layer, x.requires_grad_()) == 2 * product
    layer.weight.requires_grad_(False)
    x.grad = None
    assert flops(layer, x) == product
    assert layer.bias.grad is not None
    assert kept_bytes(lambda: layer(x), layer) == 0


def test_master_weights_names_and_ties_stay_as_they_are() -> None:
    module = Module()
    parameters, keys = list(module.parameters()), list(module.state_dict())
    plugin = converted(module)
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
    assert list(module.state_dict()) == keys
    assert module.lm_head.weight is module.embed.weight
    tokens = torch.randint(16, (2, 5))
    quantized = module(tokens)
    plugin.teardown()
    assert not torch.equal(module(tokens), quantized)
    assert not any("forward" in vars(one) for one in module.modules())


def test_include_and_exclude_choose_layers_by_endings_of_names() -> None:
    def chosen(**patterns: Any) -> list[str]:
        module = nn.ModuleDict({"model": Module(), "mha": nn.MultiheadAttention(8, 2)})
        converted(module, **patterns)
        return [name for name, one in module.named_modules() if "forward" in vars(one)]

    assert chosen() == ["model.net.0", "model.net.2"]
    assert chosen(exclude=[]) == ["model.net.0", "model.net.2", "model.lm_head"]
    assert chosen(include=["net.2", "*head"]) == ["model.net.2"]
    assert chosen(exclude=["model.net.*"]) == ["model.lm_head"]


def test_a_layer_with_a_forward_of_its_own_is_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8))
    plugin = converted(module)
    assert "forward" not in vars(module[1])
    assert plugin.describe_technique() == [
        (
            "FourBitPrecision",
            "1 of 1 linear layers, 100% of their weights",
            "fp4 (groups of 256) weights, fp4 (groups of 256 less 2 outliers) activations, nearest rounding; "
            "emulated: saves memory, not time",
        )
    ]


def test_recomputed_activations_give_the_same_gradients() -> None:
    module, x = Attention(64), torch.randn(4, 64)
    plugin = converted(module, rounding="stochastic", gradient="fp4")
    found = []
    for recompute in (False, True):
        module.zero_grad()
        plugin.load_state_dict({"step": 6, "raised_for": 0})
        with plugin.train_step_context():
            y = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
        y.square().sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_stochastic_rounding_changes_with_the_step_and_not_in_validation() -> None:
    module, x = Attention(64), torch.randn(4, 64)
    plugin = converted(module, rounding="stochastic")
    nearest = copy.deepcopy(module)
    converted(nearest)
    outputs = []
    for _ in range(2):
        with plugin.train_step_context():
            outputs.append(module(x))
    assert not torch.equal(*outputs)
    with plugin.val_step_context():
        torch.testing.assert_close(module(x), nearest(x), rtol=0, atol=0)


@pytest.mark.parametrize("evaluate", ["4-bit", "master"])
def test_validation_is_in_four_bits_or_with_the_master_weights(evaluate: str) -> None:
    trainer, module = fit(FourBitPrecision("int3", evaluate=evaluate, compute="32-true"), val_check_interval=4)
    batch = next(iter(trainer.val_dataloaders))
    master = float(module.training_step(batch, 0).detach())
    converted(module, weight="int3")
    expected = {"master": master, "4-bit": float(module.training_step(batch, 0).detach())}
    assert expected["master"] != pytest.approx(expected["4-bit"], abs=1e-4)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(expected[evaluate], abs=1e-6)


@pytest.mark.parametrize("compute", ["bf16-mixed", "bf16-true", "32-true"])
def test_compute_decides_the_dtypes(compute: str) -> None:
    seen: list[torch.dtype] = []
    module = Module()
    module.net[1].register_forward_hook(lambda *call: seen.append(call[2].dtype))
    _, module = fit(FourBitPrecision(compute=compute), module=module)
    weights = torch.bfloat16 if compute == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {weights}
    assert set(seen) == {torch.float32 if compute == "32-true" else torch.bfloat16}


def test_spike_guard_raises_precision_for_a_while() -> None:
    plugin = FourBitPrecision(raised_steps=3)
    quantized: list[bool] = []

    class Watched(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                assert Remedies(0.5, 10).carry_out("raise_precision", self.trainer) == "one level up: FourBitPrecision"
                assert Remedies(0.5, 10).carry_out("raise_precision", self.trainer) is None
            quantized.append(plugin.quantizes)
            return super().training_step(batch, batch_idx)

    fit(plugin, steps=8, module=Watched(), limit_val_batches=0)
    assert quantized == [True, True, False, False, False, True, True, True]
    assert not plugin.raise_precision()  # of no module any more
    converted_again = converted(Module())
    assert converted_again.raise_precision()
    converted_again.restore_precision()
    assert converted_again.quantizes


def test_state_in_checkpoints() -> None:
    plugin = converted(Module(), rounding="stochastic")
    with plugin.train_step_context():
        pass
    plugin.raise_precision()
    other = FourBitPrecision(rounding="stochastic")
    other.load_state_dict(plugin.state_dict())
    assert other.state_dict() == plugin.state_dict() == {"step": 1, "raised_for": 100}


def test_values_not_finite_reach_the_loss() -> None:
    layer, x = nn.Linear(64, 8), torch.randn(4, 64)
    converted(layer)
    x[1, 3:6] = torch.nan
    y = layer(x)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_an_input_changed_in_place_is_quantized_anew() -> None:
    layer, x = nn.Linear(64, 8), torch.randn(4, 64)
    converted(layer)
    first = layer(x)
    x.neg_()
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - first)
    with torch.inference_mode():
        y = x * 1
        assert torch.equal(layer(y), layer(x))
        y.neg_()
        assert torch.equal(layer(y), first)


def test_empty_batch() -> None:
    layer, x = nn.Linear(64, 8), torch.randn(0, 64, requires_grad=True)
    converted(layer)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(8, 64))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler itself uses
@pytest.mark.parametrize("arguments", [{"weight": "int4"}, {"rounding": "stochastic", "gradient": "fp4"}])
def test_compiled_in_one_graph_for_all_steps(arguments: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    plugin = converted(module, **arguments)
    compiled, found = torch.compile(module, fullgraph=True), []
    for step in range(3):
        for run in (module, compiled):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).requires_grad_()
            module.zero_grad()
            plugin.load_state_dict({"step": step, "raised_for": 0})
            with plugin.train_step_context():
                y = run(x)
                y.square().sum().backward()
            found.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
        for one, other in zip(*found[-2:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
