"""Every kind of module: forward exact to the bit, gradients those of the module itself at what was kept."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stash.packing import backward, relative_error, stashing
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

WIDTH = 64


class Attention(nn.Module):
    """As somebody would write it, with functions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mask, self.settings = settings.pop("mask", None), settings
        self.bias = nn.Parameter(torch.randn(4, 16, 16)) if self.mask == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.settings.get("enable_gqa"):
            k, v = k[:, ::2], v[:, ::2]
        mask = self.bias if self.mask == "learned" else self.mask
        y = scaled_dot_product_attention(q, k, v, mask, **self.settings)
        return self.out(y.transpose(1, 2).flatten(2))


class RepeatedHeadsAttention(nn.Module):
    """As transformers does it where a mask keeps it from using grouped queries: copies of keys and values."""

    num_key_value_groups = 2

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        mask = torch.ones(16, 16).tril().bool()
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Gated(nn.Module):
    def __init__(self, activation: nn.Module, swapped: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.activation, self.swapped = activation, swapped

    def forward(self, x: Tensor) -> Tensor:
        gate = self.activation(self.gate(x))
        return self.down(self.up(x) * gate if self.swapped else gate * self.up(x))


class ChangedGate(Gated):
    """What the activation function made is no longer there when it is used."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.activation(self.gate(x))
        gate += 1.0
        return self.down(gate * self.up(x))


class SelfAttention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def images(module: nn.Module) -> nn.Module:
    """A module of images behind one that makes images of (8, 16, 64) rows."""
    return nn.Sequential(nn.Linear(WIDTH, 96), nn.Unflatten(2, (6, 4, 4)), nn.Flatten(0, 1), module)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, 48),
    "linear without bias": lambda: nn.Linear(WIDTH, 48, bias=False),
    "conv1d of transformers": lambda: Conv1D(48, WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "layer norm without weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "rms norm of llama": lambda: LlamaRMSNorm(WIDTH),
    "gelu": lambda: nn.GELU(),
    "gelu of gpt-2": lambda: ACT2FN["gelu_new"],
    "silu": lambda: nn.SiLU(),
    "relu": lambda: nn.ReLU(),
    "dropout": lambda: nn.Dropout(0.3),
    "norm and linear": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.GELU()),
    "swiglu": lambda: Gated(nn.SiLU()),
    "a gate that is changed": lambda: ChangedGate(nn.SiLU()),
    "geglu": lambda: Gated(nn.GELU(), swapped=True),
    "attention": Attention,
    "causal attention": lambda: Attention(is_causal=True, scale=0.3),
    "masked attention": lambda: Attention(mask=torch.ones(16, 16).tril(3).bool()),
    "attention with a learned bias": lambda: Attention(mask="learned"),
    "grouped queries": lambda: Attention(enable_gqa=True, is_causal=True),
    "repeated heads": RepeatedHeadsAttention,
    "attention with dropout": lambda: Attention(dropout_p=0.2),
    "nn.MultiheadAttention": SelfAttention,
    "nn.MultiheadAttention with dropout": lambda: SelfAttention(dropout=0.1),
    "nn.TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True),
    "pre-norm, gelu": lambda: nn.TransformerEncoderLayer(
        WIDTH, 4, 96, activation=functional.gelu, batch_first=True, norm_first=True
    ),
    "conv2d": lambda: images(nn.Conv2d(6, 8, 3, padding=1, stride=2)),
    "grouped, dilated conv2d": lambda: images(nn.Conv2d(6, 6, 2, groups=2, dilation=2, bias=False)),
    "conv1d": lambda: nn.Conv1d(16, 8, 3),
    "padded by its name": lambda: images(nn.Conv2d(6, 8, 3, padding="same")),
    "batch and group norm": lambda: images(nn.Sequential(nn.BatchNorm2d(6), nn.GroupNorm(2, 6))),
    "gru": lambda: nn.Sequential(nn.GRU(WIDTH, 32, batch_first=True), First()),
}


class First(nn.Module):
    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0]


every_module = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MODULES.items()])


def steps(
    make: Callable[[], nn.Module], bits: int, **settings: Any
) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
    """Loss and gradients, also that of the input, without and with a stash."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"inner": make(), "input": nn.Linear(WIDTH, WIDTH)}).train()
    x = torch.randn(8, 16, WIDTH)
    weights: list[Tensor] = []

    def loss() -> Tensor:
        y = module["inner"](module["input"](x))
        if not weights:
            weights.append(torch.randn_like(y))
        return (y * weights[0]).sum()

    plain = backward(module, loss)
    buffers = copy.deepcopy(dict(module.named_buffers()))
    with stashing(module, bits, **settings) as (stash, _):
        found = backward(module, loss, stash)
        assert stash.meter.live_bytes == 0
    assert buffers.keys() == dict(module.named_buffers()).keys()
    return plain, found


@every_module
def test_forward_is_exact_and_at_16_bits_so_is_nearly_the_gradient(make: Callable[[], nn.Module]) -> None:
    by_kind = dict.fromkeys(("norm", "loss", "other"), 16)
    plain, found = steps(make, 16, by_kind=by_kind, rounding="nearest")
    assert found[0] == plain[0]
    assert relative_error(found[1], plain[1]) < 2e-4


@every_module
def test_with_nothing_packed_the_gradient_is_exact(make: Callable[[], nn.Module]) -> None:
    plain, found = steps(make, 32, measure=False)
    assert found[0] == plain[0]
    assert relative_error(found[1], plain[1]) < 1e-6


@every_module
def test_gradient_error_at_8_bits(make: Callable[[], nn.Module]) -> None:
    plain, found = steps(make, 8)
    assert found[0] == plain[0]
    assert relative_error(found[1], plain[1]) < 0.025


@pytest.mark.parametrize("make", [Attention, lambda: Attention(is_causal=True)])
def test_attention_gradient_at_2_and_4_bits(make: Callable[[], nn.Module]) -> None:
    """Where packing all that attention saves would give 0.1 and 3.75 in the research."""
    for bits, limit in ((4, 0.1), (2, 0.4)):
        plain, found = steps(make, bits, include=["attention"], rounding="nearest", format="affine")
        assert relative_error(found[1], plain[1]) < limit


def test_frozen_weights_keep_nothing_and_an_input_without_gradient_costs_no_gemm() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    module = nn.Sequential(layer)
    x = torch.randn(32, WIDTH, requires_grad=True)
    with stashing(module, 4) as (stash, _):
        layer.weight.requires_grad_(False)
        module(x).sum().backward()
        assert stash.meter.packed_bytes.total() == 0
        assert torch.allclose(x.grad, layer.weight.sum(0).expand(32, -1), atol=1e-5)  # type: ignore[arg-type]
        assert layer.weight.grad is None
        layer.weight.requires_grad_(True)
        y = module(x.detach())
        assert [tensor.dtype for tensor in y.grad_fn.saved_tensors if tensor is not None] == [torch.uint8] * 2


def test_a_shared_input_is_packed_once_and_a_recomputed_one_not_at_all() -> None:
    module = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkv"} | {"norm": nn.LayerNorm(WIDTH)})
    x = torch.randn(32, WIDTH, requires_grad=True)
    for source, kind in (((lambda: x + 0), "linear"), ((lambda: module["norm"](x)), "norm")):
        with stashing(module, 8) as (stash, _):
            shared = source()
            loss = sum(module[name](shared).sum() for name in "qkv")
            assert stash.meter.packed_bytes.total() == stash.meter.packed_bytes[kind] == x.numel() * 8.5 / 8
            loss.backward()


def test_double_backward_is_refused_and_retain_graph_gives_the_same_bits() -> None:
    module = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
    x = torch.randn(32, WIDTH, requires_grad=True)
    with stashing(module, 4):
        loss = module(x).square().sum()
        (one,) = torch.autograd.grad(loss, x, retain_graph=True)
        (two,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(one, two)
        (once,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            once.sum().backward()


def test_torch_func_sees_the_module_itself() -> None:
    module = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
    weights, x = {name: param.detach() for name, param in module.named_parameters()}, torch.randn(5, 32, WIDTH)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = each(weights, x)
    with stashing(module, 4):
        found = each(weights, x)
    assert all(torch.equal(found[name], expected[name]) for name in weights)


def test_eval_under_no_grad_is_the_module_itself() -> None:
    module = nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True).eval()
    x = torch.randn(4, 16, WIDTH)
    with torch.no_grad():
        expected = module(x)
    with stashing(nn.Sequential(module), 2) as (stash, _), torch.no_grad():
        assert torch.equal(module(x), expected)
        assert stash.meter.packed_bytes.total() == 0


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of K gradients comes near the exact one as 1/√K, where no value is clipped."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    x, weights = torch.randn(256, WIDTH), torch.randn(256, WIDTH)
    _, exact = backward(module, lambda: (module(x) * weights).sum())
    with stashing(module, 4, format="affine") as (stash, _):
        errors, total = [], torch.zeros_like(exact)
        for step in range(64):
            stash.begin_step(step)
            total += backward(module, lambda: (module(x) * weights).sum(), stash)[1]
            errors.append(relative_error(total / (step + 1), exact))
    assert errors[15] == pytest.approx(errors[0] / 4, rel=0.15)
    assert errors[63] == pytest.approx(errors[0] / 8, rel=0.15)
