"""Perturbing just in time: the result is that of perturbed weights, and the weights themselves are never written."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.nn.utils import parametrizations
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_lightning.optim import FZOO
from lowbit_lightning.optim.forward_only import Evaluation
from lowbit_lightning.strategies.just_in_time import JustInTime

AT = Evaluation(2, 1)
TOKENS = torch.randint(0, 50, (3, 6))


class Tied(nn.Module):
    """An embedding whose weight is the head's as well: through a module, or through a function call."""

    def __init__(self, by_function: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 8, padding_idx=0), nn.LayerNorm(8)
        self.by_function = by_function
        if not by_function:
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embed(tokens))
        return linear(hidden, self.embed.weight) if self.by_function else self.head(hidden)


class Nested(nn.Module):
    """Parameters at every level, one of them inside a list comprehension of a child's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"x": nn.Linear(8, 8)})["x"]) for _ in "ab"
        )
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(input=tokens) * self.scale
        for block in self.blocks:
            hidden = block(hidden)
        stacked = torch.stack([expert.weight for expert in self.experts])
        return hidden @ stacked.sum(0)


class Attention(nn.Module):
    """Reads its output projection's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(50, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.attention(hidden, hidden, hidden, need_weights=False)[0]


class Hooked(nn.Module):
    """A weight made by a parametrization, a subclass of Embedding, a renormalizing one, and users' hooks."""

    def __init__(self) -> None:
        super().__init__()

        class Scaled(nn.Embedding):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * 2

        self.scaled, self.renormalized = Scaled(50, 8), nn.Embedding(50, 8, max_norm=1.0)
        self.hooked = nn.Embedding(50, 8)
        self.hooked.register_forward_hook(lambda module, args, output: output + module.weight[0])
        self.linear = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.scaled(tokens) + self.renormalized(tokens) + self.hooked(tokens))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.conv = nn.Embedding(50, 8), nn.LSTM(8, 8, batch_first=True), nn.Conv1d(6, 4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.lstm(self.embed(tokens))[0]
        return self.conv(scaled_dot_product_attention(hidden, hidden, hidden))


class Hidden(torch.autograd.Function):
    """Torch does not tell anybody that this is called with a parameter."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden * weight


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.weight, self.unused = nn.Embedding(50, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return Hidden.apply(self.embed(tokens), self.weight)


def tied_llama() -> nn.Module:
    """A Hugging Face model: buffers, RMS norms of its own, and a head that is the embedding."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=16, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    model.forward = partial(type(model).forward, model, use_cache=False, return_dict=False)
    return Logits(model)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "tied by module": lambda: Tied(by_function=False),
    "tied by function": lambda: Tied(by_function=True),
    "nested": Nested,
    "attention": Attention,
    "hooked": Hooked,
    "recurrent": Recurrent,
    "custom function": Custom,
    "tied Llama": tied_llama,
}


def perturbed_twin(module: nn.Module, optimizer: FZOO, evaluation: Evaluation) -> list[Tensor]:
    return [
        optimizer.perturb(group, name, param, evaluation, torch.empty_like(param)).clone()
        for group, name, param in optimizer.trainable()
    ]


@pytest.mark.parametrize("perturbation", ["rademacher", "rank1"])
@pytest.mark.parametrize("name", MODULES)
def test_result_is_that_of_perturbed_weights(name: str, perturbation: Any) -> None:
    module = MODULES[name]()
    optimizer = FZOO(module.named_parameters(), eps=1e-2, perturbation=perturbation)
    just_in_time = JustInTime(module, optimizer)
    with torch.no_grad():
        just_in_time.run(Evaluation(0, 0), lambda: module(TOKENS), watch=True)
        found, _ = just_in_time.run(AT, lambda: module(TOKENS))
        before = [param.clone() for param in module.parameters()]
        addresses = [param.data_ptr() for param in module.parameters()]
        for (_, _, param), value in zip(optimizer.trainable(), perturbed_twin(module, optimizer, AT), strict=True):
            param.copy_(value)
        expected = module(TOKENS)
    assert torch.equal(found, expected)
    assert addresses == [param.data_ptr() for param in module.parameters()]
    assert before != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in MODULES if name != "hooked"])  # max_norm writes its own weight
def test_weights_are_bit_identical_after_evaluation(name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]().to(dtype)
    optimizer = FZOO(module.named_parameters())
    just_in_time = JustInTime(module, optimizer)
    before = [param.clone() for param in module.parameters()]
    with torch.no_grad():
        for watch in (True, False):
            for evaluation in optimizer.evaluations():
                just_in_time.run(evaluation, lambda: module(TOKENS), watch=watch)
    assert all(torch.equal(param, old) for param, old in zip(module.parameters(), before, strict=True))
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in module.modules())


def test_weights_are_back_after_an_error() -> None:
    module = Nested()
    before = [(param.data_ptr(), param.clone()) for param in module.parameters()]
    just_in_time = JustInTime(module, FZOO(module.named_parameters()))

    class Stop(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            raise RuntimeError("out of luck")

    module.blocks.append(Stop())
    with pytest.raises(RuntimeError, match="out of luck"), torch.no_grad():
        just_in_time.run(AT, lambda: module(TOKENS), watch=True)
    for param, (address, old) in zip(module.parameters(), before, strict=True):
        assert param.data_ptr() == address
        assert torch.equal(param, old)


def watched(module: nn.Module, evaluation: Evaluation) -> tuple[list[str], list[str], bool]:
    optimizer = FZOO(module.named_parameters())
    with torch.no_grad():
        _, watch = JustInTime(module, optimizer).run(evaluation, lambda: module(TOKENS), watch=True)
    assert watch is not None
    names = {id(param): name for name, param in module.named_parameters()}
    used = [names[id(param)] for param in watch.used()]
    return used, sorted(names[key] for key in watch.outside), watch.is_complete


def test_what_is_used_outside_its_module_is_found() -> None:
    assert watched(Tied(by_function=True), Evaluation(0, 0))[1:] == (["embed.weight"], True)
    assert watched(Tied(by_function=True), AT)[1:] == (["embed.weight"], False)
    assert watched(Tied(by_function=False), AT)[1:] == ([], True)
    assert watched(Nested(), AT)[1] == ["experts.0.weight", "experts.1.weight"]
    assert watched(Attention(), AT)[1] == ["attention.out_proj.bias", "attention.out_proj.weight"]


def test_what_takes_no_part_is_not_used() -> None:
    used, _, _ = watched(Custom(), Evaluation(0, 0))
    assert used == ["weight", "embed.weight"]
    used, _, _ = watched(Nested(), Evaluation(0, 0))
    assert "experts.0.weight" in used
    assert "experts.0.bias" not in used


def test_frozen_parameters_are_not_perturbed() -> None:
    module = Nested()
    module.blocks.requires_grad_(False)
    seen = []
    module.blocks[0][0].register_forward_hook(lambda part, args, output: seen.append(part.weight.data_ptr()))
    with torch.no_grad():
        JustInTime(module, FZOO(module.named_parameters())).run(AT, lambda: module(TOKENS))
    assert seen == [module.blocks[0][0].weight.data_ptr()]


def test_parameters_may_be_unfrozen_in_between() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].requires_grad_(False)
    optimizer, inputs = FZOO(module.named_parameters(), eps=0.5), torch.ones(1, 4)
    just_in_time = JustInTime(module, optimizer)
    with torch.no_grad():
        few, _ = just_in_time.run(AT, lambda: module(inputs))
        module[0].requires_grad_(True)
        all_of_them, _ = just_in_time.run(AT, lambda: module(inputs))
    assert not torch.equal(few, all_of_them)


def test_scratch_is_the_largest_module_not_the_model() -> None:
    module = nn.Sequential(
        nn.Embedding(4000, 16), *(nn.Linear(16, 16, bias=False) for _ in range(40)), nn.Linear(16, 60)
    )
    just_in_time = JustInTime(module, FZOO(module.named_parameters()))
    with torch.no_grad():
        just_in_time.run(AT, lambda: module(torch.tensor([1])))
    assert just_in_time._plan is not None
    buffers = just_in_time._plan.scratch._buffers.values()
    assert sum(buffer.numel() for buffer in buffers) == 4 * (16 * 60 + 64)  # the head's weight, its bias padded


def test_a_large_parameter_has_memory_for_its_forward_only() -> None:
    """After a language model's head come logits and loss, the peak of memory."""
    module = nn.Sequential(
        nn.Embedding(500, 16), *(nn.Linear(16, 16, bias=False) for _ in range(4)), nn.Linear(16, 500)
    )
    just_in_time = JustInTime(module, FZOO(module.named_parameters()))
    with torch.no_grad():
        moved, _ = just_in_time.run(AT, lambda: module(torch.tensor([1])))
    assert not torch.equal(moved, module(torch.tensor([1])))
    assert just_in_time._plan is not None
    buffers = just_in_time._plan.scratch._buffers.values()
    assert sum(buffer.numel() for buffer in buffers) == 4 * 512  # the head's bias, padded; its weight is not there
