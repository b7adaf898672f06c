"""The loss of a language model that keeps no logits: its value, its gradients, and when it steps aside."""

from typing import Any

import pytest
import torch
from stash.packing import backward, relative_error, stashing
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_lightning.stash import Stash, StashPrecision
from lowbit_lightning.stash import loss as stash_loss

VOCABULARY = 300


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **shape)).train()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(1))


def losses(model: Any, ids: Tensor, labels: Tensor, **options: Any) -> dict[str, Any]:
    """Without and with a stash of 16 bits, and what the latter kept of the loss."""

    def loss() -> Tensor:
        value: Tensor = model(input_ids=ids, labels=labels, **options).loss
        return value

    plain = backward(model, loss)
    by_kind = dict.fromkeys(("norm", "loss", "other"), 16)
    with stashing(model, 16, by_kind=by_kind, rounding="nearest") as (stash, _):
        found = backward(model, loss, stash)
    return {"plain": plain, "found": found, "raw": stash.meter.raw_bytes, "packed": stash.meter.packed_bytes}


@pytest.mark.parametrize("ignored", [0, 9])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(5)])
@pytest.mark.parametrize("rows_at_a_time", [1 << 22, 1000])
def test_value_and_gradients_are_those_of_transformers(
    model: Any, ids: Tensor, items: Any, ignored: int, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stash_loss, "_LOGITS_AT_A_TIME", rows_at_a_time)
    labels = ids.clone()
    labels[:, :ignored] = -100
    got = losses(model, ids, labels, **({} if items is None else {"num_items_in_batch": items}))
    assert got["found"][0] == pytest.approx(got["plain"][0], rel=1e-6)
    assert relative_error(got["found"][1], got["plain"][1]) < 3e-4
    assert got["raw"]["loss"] == pytest.approx(ids.numel() * VOCABULARY * 4, rel=0.01)  # and targets
    assert got["packed"]["loss"] == 0  # the hidden states are those of the last norm
    assert got["packed"]["other"] < 4000


def test_a_head_with_a_bias_and_tied_weights(model: Any, ids: Tensor) -> None:
    model.lm_head = nn.Linear(32, VOCABULARY)
    model.lm_head.weight = model.model.embed_tokens.weight
    got = losses(model, ids, ids)
    assert got["raw"]["loss"] > 0
    assert relative_error(got["found"][1], got["plain"][1]) < 3e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_and_in_bf16(model: Any, ids: Tensor, dtype: torch.dtype) -> None:
    model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        got = losses(model, ids, ids)
    assert got["found"][0] == pytest.approx(got["plain"][0], rel=1e-6)
    assert relative_error(got["found"][1], got["plain"][1]) < 0.02


def test_no_label_that_counts_is_not_a_number_as_in_torch(model: Any, ids: Tensor) -> None:
    got = losses(model, ids, torch.full_like(ids, -100))
    assert str(got["found"][0]) == str(got["plain"][0]) == "nan"


def test_logits_can_be_used_beside_the_loss(model: Any, ids: Tensor) -> None:
    def loss() -> Tensor:
        output = model(input_ids=ids, labels=ids)
        value: Tensor = output.loss + output.logits.square().mean()
        return value

    plain = backward(model, loss)
    with stashing(model, 8) as (stash, _):
        found = backward(model, loss, stash)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative_error(found[1], plain[1]) < 0.03


def test_logits_that_are_not_the_heads_own_go_to_the_original(model: Any, ids: Tensor) -> None:
    with stashing(model, 8):
        logits = model(input_ids=ids).logits
        expected = model.loss_function(logits * 1.0, ids, VOCABULARY)
        assert "StashedCrossEntropy" not in str(expected.grad_fn.next_functions)
        assert model.loss_function(logits, ids, VOCABULARY).item() == pytest.approx(expected.item(), rel=1e-6)
        logits = model(input_ids=ids).logits
        logits *= 2.0
        halved = model.loss_function(logits / 2.0, ids, VOCABULARY)
        assert model.loss_function(logits, ids, VOCABULARY).item() != pytest.approx(halved.item(), rel=1e-3)
        with torch.no_grad():
            assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert "_loss_function" not in vars(model)


def test_an_empty_batch() -> None:
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(VOCABULARY, 8, requires_grad=True)
    stash = Stash(StashPrecision(4))
    targets = torch.zeros(0, dtype=torch.long)
    loss = stash_loss.StashedCrossEntropy.apply(x, weight, None, x @ weight.detach().T, targets, -100, stash, "loss")
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()
