"""All perturbed passes in one give the losses of one pass after another, in modules that know nothing of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract.third_party import NextByte, windows
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import ExactResume
from lowbit_lightning.models import CausalLM, SequenceClassifier
from lowbit_lightning.optim import FZOO, MeZO
from lowbit_lightning.strategies import ForwardOnlyStrategy
from lowbit_lightning.strategies.batched import BatchedPasses

WIDTH, CLASSES, SAMPLES, N = 8, 3, 6, 5
# The built-in models have one; validation is none of this file's business.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # A resumed run writes where the first one wrote.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Losses(Callback):
    """The losses of every step, as they reach the optimizer."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(list(optimizer.param_groups[0]["pending_losses"]))


def fit(module: LightningModule, batch: Any, execution: str, steps: int = 2, **options: Any) -> list[list[float]]:
    """Train on one batch; the warning that makes passes sequential is an error in tests."""
    settings = {"perturbation": "rank1", "num_perturbations": N, "lr": 1e-4, "eps": 1e-3} | options.pop("fzoo", {})
    losses = Losses()
    module.configure_optimizers = lambda: FZOO(module.named_parameters(), execution=execution, **settings)
    torch.manual_seed(1)
    ckpt_path = options.pop("ckpt_path", None)
    defaults: dict[str, Any] = {
        "strategy": ForwardOnlyStrategy(), "accelerator": "cpu", "max_steps": steps, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [losses],
    }  # fmt: skip
    Trainer(**(defaults | options)).fit(module, DataLoader([batch] * steps, batch_size=None), ckpt_path=ckpt_path)
    return losses.steps


def assert_same_losses(make: Any, batch: Any, tolerance: float = 2e-6, first: int = 0, **options: Any) -> None:
    """The batched run's second step is not made one by one any more, and starts from its own first update."""
    runs = []
    for execution in ("sequential", "batched"):
        torch.manual_seed(0)
        runs.append(torch.tensor(fit(make(), batch, execution, **options)))
    sequential, batched = (run[first:] for run in runs)
    assert sequential.std(1).min() > 20 * tolerance, "the comparison would show nothing"
    torch.testing.assert_close(batched, sequential, rtol=tolerance, atol=tolerance)


class Net(LightningModule):
    """Anybody's module around a body that takes (SAMPLES, WIDTH) features."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body or nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.3), nn.GELU())
        self.head = nn.Linear(16, CLASSES)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        loss = functional.cross_entropy(self.head(self.body(batch[0])).float(), batch[1])
        self.outputs.append(loss)
        self.log("train_loss", loss)
        return {"loss": loss}


def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SAMPLES, WIDTH, generator=generator), torch.arange(SAMPLES) % CLASSES]


def tokens(length: int = 7, **more: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids, "num_bytes": torch.full((2,), length - 1)} | more


# ---- the losses are those of one pass after another -----------------------------------------------------------------

SIZE = {"vocab_size": 64, "max_position_embeddings": 32}
LLAMA = SIZE | {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1,
}  # fmt: skip
GPT2 = SIZE | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
GEMMA = LLAMA | {"model_type": "gemma", "head_dim": 8}
BERT = SIZE | {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config", [LLAMA, LLAMA | {"tie_word_embeddings": True}, GPT2, GEMMA], ids=["llama", "tied", "gpt2", "gemma"]
)
def test_language_models(config: dict[str, Any], attention: Any) -> None:
    assert_same_losses(lambda: CausalLM(config=config, attn_implementation=attention), tokens())


def test_padded_texts_in_an_encoder_with_dropout() -> None:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    batch = tokens(attention_mask=mask) | {"labels": torch.tensor([0, 2])}
    assert_same_losses(lambda: SequenceClassifier(config=BERT, num_labels=3), batch)


def test_the_module_of_the_contract_tests() -> None:
    assert_same_losses(NextByte, windows()[:2])


def test_only_adapters_are_perturbed_on_a_frozen_base() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, 16)
            self.requires_grad_(False)
            self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 16, bias=False)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.up(self.down(input))

    assert_same_losses(lambda: Net(Adapted()), features())


def test_weights_used_as_functions_and_outside_their_module() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, 16)
            self.square = nn.Parameter(torch.randn(16, 16) / 4)

        def forward(self, input: Tensor) -> Tensor:
            hidden = (input @ self.first.weight.to(input.dtype).T).tanh() @ self.square
            return torch.addmm(self.first.bias, functional.linear(hidden, weight=self.square), self.square)

    assert_same_losses(lambda: Net(Functions()), features())


def test_patches_and_small_tensors_as_in_vision_transformers() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 16, 2, stride=2)
            self.positions = nn.Parameter(torch.randn(1, 2, 16))
            self.scale = nn.Parameter(torch.ones(()))
            self.wide = nn.Linear(16, 16)

        def forward(self, input: Tensor) -> Tensor:
            patches = self.patches(input.view(-1, 1, 4, 2)).flatten(2).mT
            return self.wide((patches + self.positions) * self.scale).mean(1)

    assert_same_losses(lambda: Net(Patches()), features())


def test_mean_baseline_and_accumulation() -> None:
    assert_same_losses(Net, features(), fzoo={"baseline": "mean"}, accumulate_grad_batches=2, steps=4, max_steps=2)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "64-true"])
def test_other_precisions_see_the_same_perturbations(precision: Any) -> None:
    """Rounding differs, hence the wide step and the correlation."""
    body = nn.Sequential(nn.Linear(WIDTH, 16), nn.LayerNorm(16))
    state = Net(body).state_dict()
    runs = []
    for execution in ("sequential", "batched"):
        net = Net(body)
        net.load_state_dict(state)
        options: dict[str, Any] = {"precision": precision, "fzoo": {"eps": 3e-2, "num_perturbations": 16, "lr": 0.0}}
        runs.append(torch.tensor(fit(net, features(), execution, **options))[1, 1:])
    assert torch.corrcoef(torch.stack(runs))[0, 1] > 0.95


# ---- nothing is left behind -----------------------------------------------------------------------------------------


def test_nobody_notices_the_batched_passes() -> None:
    logged: list[Any] = []

    class Counts(Net):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            logged.extend([value] if name == "train_loss" else [])

    net = Counts()
    weights = {name: parameter.clone() for name, parameter in net.named_parameters()}
    losses = fit(net, features(), "batched", steps=3, fzoo={"lr": 0.0})
    assert [float(value) for value in logged] == [float(value) for value in net.outputs] == [step[0] for step in losses]
    assert int(net.seen) == 3
    assert all(torch.equal(parameter, weights[name]) for name, parameter in net.named_parameters())


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    """Though the resumed run makes its first step's passes one by one as well, to check them."""

    def run(**options: Any) -> Net:
        net = Net()
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
        fit(net, features(), "batched", 5, callbacks=[checkpoint, ExactResume()], enable_checkpointing=True, **options)
        return net

    straight = run().state_dict()
    resumed = run(ckpt_path=next(tmp_path.glob("*step=2.ckpt"))).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_the_loss_falls() -> None:
    losses = fit(Net(nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh())), features(), "auto", 150, fzoo={"lr": 3e-2})
    assert losses[-1][0] < 0.5 * losses[0][0]


# ---- what cannot be batched is made one after another, with one message ---------------------------------------------


class Item(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output * min(1.0, float(output.abs().max()))


class Branch(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output if output.sum() > 0 else -output


class Einsum(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", input, self.weight)


class Numbers(nn.Linear):
    """Torch does not see what becomes of this weight."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, torch.tensor(self.weight.tolist()))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (Item(WIDTH, 16), r"because body \(Item\) cannot be batched: vmap: It looks like you're calling .item\(\)"),
        (Branch(WIDTH, 16), r"because body \(Branch\) cannot be batched: vmap: It looks like you're attempting to use"),
        (
            nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16)),
            r"because body.1 \(BatchNorm1d\) cannot be batched: Batch norm got a batched tensor",
        ),
        (
            Einsum(WIDTH, 16),
            r"because body \(Einsum\) cannot be batched: parameter 'body.weight' goes into einsum\(\), for which",
        ),
        (Numbers(WIDTH, 16), r"because batched losses differ from theirs by"),
    ],
    ids=["item", "branch", "in place", "no rule", "unseen"],
)
def test_falls_back(body: nn.Module, message: str) -> None:
    net, state = Net(body), {name: value.clone() for name, value in Net(body).state_dict().items()}
    net.load_state_dict(state)
    with pytest.warns(UserWarning, match=message) as record:
        batched = fit(net, features(), "batched", steps=3)
    assert sum("one after another" in str(warning.message) for warning in record) == 1
    net.load_state_dict(state)
    assert batched == fit(net, features(), "sequential", steps=3)


def test_a_nonfinite_loss_says_nothing_about_batching() -> None:
    class Overflows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"] * (torch.inf if batch_idx == 0 else 1.0)

    assert_same_losses(Overflows, features(), steps=3, first=1)


def test_auto_says_once_what_it_chose_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lowbit_lightning.strategies.batched.rank_zero_info", said.append)
    fit(Net(), features(), "auto")
    wide = [features()[0].repeat(100, 1), features()[1].repeat(100)]
    fit(Net(), wide, "auto")
    fit(Net(Item(WIDTH, 16)), features(), "auto")
    assert [message.split("perturbed passes ")[1] for message in said] == [
        "all 5 in one.",
        "one after another: a batch has 600 tokens, and up to 128 it is faster in one.",
        "one after another, because body (Item) cannot be batched: vmap: It looks like you're calling .item() on a "
        "Tensor",
    ]


@pytest.mark.parametrize("make", [lambda net: FZOO(net.parameters()), lambda net: MeZO(net.parameters())])
def test_full_signs_are_never_batched(make: Any) -> None:
    net = Net()
    optimizer = make(net)
    assert not BatchedPasses(net, optimizer).are_wanted(optimizer.evaluations()[1:], features())
