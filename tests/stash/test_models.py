"""Unmodified models of transformers and torch: bytes, gradient errors, and what composes with them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stash.packing import backward, gradients, relative_error, saved_bytes, stashing, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, LENGTH = 512, 64
IDS = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS).index_fill_(1, torch.arange(50, LENGTH), 0)


class Adapted(nn.Module):
    """A frozen layer with an adapter of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 8, bias=False), nn.Linear(8, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def llama(**settings: Any) -> Any:
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **(shape | settings)))


def language_loss(model: Any, **inputs: Any) -> Callable[[], Tensor]:
    return lambda: model(input_ids=IDS, labels=IDS, **inputs).loss


def prepared(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().train()


@pytest.fixture(scope="module")
def trained_llama() -> Any:
    model = prepared(llama)
    train(model, language_loss(model), steps=15)
    return model


def test_what_autograd_would_keep_is_what_it_keeps(trained_llama: Any) -> None:
    """The raw bytes, measured operation by operation while the stash is on, against a count on the plain model."""
    expected = saved_bytes(language_loss(trained_llama), trained_llama)
    with stashing(trained_llama, 4) as (stash, _):
        backward(trained_llama, language_loss(trained_llama), stash)
    assert stash.meter.raw_bytes.total() == pytest.approx(expected, rel=0.01)


def test_what_is_counted_as_packed_is_what_autograd_keeps(trained_llama: Any) -> None:
    with stashing(trained_llama, 4, measure=False) as (stash, _):
        kept = saved_bytes(language_loss(trained_llama), trained_llama, stash)
    beside = 2 * LENGTH * 32 * 4 + 2 * IDS.nbytes  # rotary tables and token ids, which autograd keeps by itself
    assert stash.meter.packed_bytes.total() == pytest.approx(kept - beside, rel=0.01)


def test_llama_at_4_bits_is_7_times_smaller_than_fp32_and_3_5_times_smaller_than_bf16(trained_llama: Any) -> None:
    loss = language_loss(trained_llama)
    fp32 = saved_bytes(loss, trained_llama)
    half = copy.deepcopy(trained_llama).bfloat16()
    bf16 = saved_bytes(language_loss(half), half)
    plain = backward(trained_llama, loss)
    with stashing(trained_llama, 4) as (stash, _):
        found = backward(trained_llama, loss, stash)
    packed = stash.meter.packed_bytes.total()
    assert fp32 / packed > 11
    assert bf16 / packed > 6
    assert stash.meter.peak_bytes <= packed
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative_error(found[1], plain[1]) < 0.15
    with stashing(half, 4) as (stash, _):
        backward(half, language_loss(half), stash)
    assert bf16 / stash.meter.packed_bytes.total() > 6


@pytest.mark.parametrize(("bits", "settings", "limit"), [
    (8, {}, 0.02), (4, {}, 0.15), (4, {"rounding": "nearest"}, 0.1), (4, {"format": "affine", "box": 32}, 0.1),
    (2, {"format": "affine", "box": 32}, 0.45),
])  # fmt: skip
def test_gradient_error_of_llama(trained_llama: Any, bits: int, settings: dict[str, Any], limit: float) -> None:
    plain = backward(trained_llama, language_loss(trained_llama))
    with stashing(trained_llama, bits, **settings) as (stash, _):
        found = backward(trained_llama, language_loss(trained_llama), stash)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative_error(found[1], plain[1]) < limit
    assert 0 < stash.meter.error < 1.5 * 2 ** (1 - bits)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Callable[[], Tensor]], float]] = {
    "llama, grouped queries, padded": (
        lambda: llama(num_key_value_heads=2), lambda model: language_loss(model, attention_mask=PADDED), 8,
    ),
    "gpt-2": (
        lambda: GPT2LMHeadModel(GPT2Config(
            n_embd=128, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=LENGTH, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )), language_loss, 12,
    ),
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        )), lambda model: lambda: model(input_ids=IDS, attention_mask=PADDED, labels=IDS[:, 0] % 2).loss, 8,
    ),
    "t5, gated": (
        lambda: T5ForConditionalGeneration(T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0,
            pad_token_id=0, feed_forward_proj="gated-gelu",
        )), lambda model: language_loss(model, use_cache=False), 5,
    ),
    "eager attention": (lambda: llama(attn_implementation="eager"), language_loss, 3.5),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_as_they_come(name: str) -> None:
    make, loss_of, ratio = MODELS[name]
    model = prepared(make)
    loss = loss_of(model)
    train(model, loss, steps=3)
    keys = list(model.state_dict())
    plain = backward(model, loss)
    for bits, limit in ((8, 0.04), (4, 0.45)):
        with stashing(model, bits) as (stash, _):
            assert list(model.state_dict()) == keys
            found = backward(model, loss, stash)
        assert found[0] == pytest.approx(plain[0], rel=1e-6)
        assert relative_error(found[1], plain[1]) < limit
        assert stash.meter.live_bytes == 0
    assert stash.meter.raw_bytes.total() / stash.meter.packed_bytes.total() > ratio
    assert backward(model, loss)[0] == plain[0]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_packs_what_lies_between(reentrant: bool) -> None:
    model = prepared(llama)
    plain = backward(model, language_loss(model))
    # transformers renamed it in the course of version 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    with stashing(model, 8) as (stash, _):
        found = backward(model, language_loss(model), stash)
        boundaries = stash.meter.packed_bytes["other"]
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative_error(found[1], plain[1]) < 0.03
    assert stash.meter.live_bytes == 0
    if not reentrant:  # a reentrant one keeps its input by itself, exactly
        assert boundaries < 1.2 * 2 * IDS.numel() * 128 * 8.5 / 8 + 10_000


def test_functions_that_are_checkpointed_save_the_same_in_both_passes() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    x = torch.randn(4, 16, 64, requires_grad=True)
    with stashing(layer, 8) as (stash, _):
        value, _ = backward(layer, lambda: checkpoint(layer, x, use_reentrant=False).square().mean(), stash)
    assert value == backward(layer, lambda: layer(x).square().mean())[0]


@pytest.mark.parametrize("cast", ["autocast", "bf16"])
def test_bf16(cast: str) -> None:
    model = prepared(llama)
    if cast == "bf16":
        model.bfloat16()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
            value: Tensor = language_loss(model)()
        return value

    plain = backward(model, loss)
    with stashing(model, 8) as (stash, _):
        found = backward(model, loss, stash)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative_error(found[1], plain[1]) < 0.03
    assert stash.meter.raw_bytes.total() / stash.meter.packed_bytes.total() > 4


def test_adapters_keep_only_what_adapters_need() -> None:
    whole = prepared(llama)
    with stashing(whole, 4) as (stash, _):
        backward(whole, language_loss(whole), stash)
        everything = stash.meter.packed_bytes
    model = prepared(llama).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.self_attn.v_proj = (
            Adapted(layer.self_attn.q_proj),
            Adapted(layer.self_attn.v_proj),
        )
    plain = backward(model, language_loss(model))
    with stashing(model, 4) as (stash, _):
        found = backward(model, language_loss(model), stash)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative_error(found[1], plain[1]) < 0.15
    assert stash.meter.packed_bytes["linear"] < everything["linear"]


def test_a_copy_of_a_model_that_is_being_trained_runs_on_its_own() -> None:
    model = prepared(llama)
    expected = model(input_ids=IDS).logits
    with stashing(model, 4):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert torch.equal(twin(input_ids=IDS).logits, expected)
    language_loss(twin)().backward()  # type: ignore[no-untyped-call]
    assert gradients(twin).any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_a_function_that_is_compiled_within_a_module_keeps_what_its_compiler_decides() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.function = torch.compile(lambda x: nn.functional.gelu(x) * x, backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.function(self.layer(x))
            return hidden

    model, x = nn.Sequential(nn.LayerNorm(64), Attention()), torch.randn(4, 32, 64)
    plain = backward(model, lambda: model(x).square().mean())
    with stashing(model, 8) as (stash, _):
        found = backward(model, lambda: model(x).square().mean(), stash)
        assert stash.meter.packed_bytes["activation"] == 0
        assert stash.meter.packed_bytes["norm"] > 0
    assert found[0] == plain[0]
    assert relative_error(found[1], plain[1]) < 0.02


def test_accumulated_gradients_add_up() -> None:
    model = prepared(llama)
    with stashing(model, 4, rounding="nearest") as (stash, _):
        _, once = backward(model, language_loss(model), stash)
        language_loss(model)().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(gradients(model), 2 * once, rtol=1e-4, atol=1e-7)
