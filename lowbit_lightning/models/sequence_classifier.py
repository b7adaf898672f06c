"""SequenceClassifier: any Hugging Face encoder or decoder as a text classifier, to be fine-tuned by YAML.

Either pooled hidden states go into a linear head, which can start from class means, or, as in the papers on
zeroth-order fine-tuning, a causal model completes a prompt and the classes are words it may complete it with. It knows
nothing of forward-only training; what that needs of any module is that a training step's loss depends on nothing but
batch, weights and random generators.
"""

import fnmatch
import inspect
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Accuracy, MeanMetric
from transformers import AutoModel, AutoModelForCausalLM

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.models.centroids import centroid_head
from lowbit_lightning.models.hugging_face import load_model, with_adapters


class SequenceClassifier(LightningModule):
    """A text classifier.

    Logs ``train_loss``, ``val_loss`` and ``val_accuracy``, the latter two for ``test_`` too. Batches are
    ``{"input_ids", "attention_mask": int64 (batch, length), "labels": int64 (batch,)}``, padded on the right.

    Args:
        config: a Hugging Face configuration to train from scratch: ``model_type`` (bert, llama, ...) and any of that
            architecture's settings.
        pretrained: pretrained weights instead: a folder, a hub name, or ``package:NAME`` for those in an installed
            Python package.
        num_labels: number of classes; null asks the data module for it.
        pooling: what the head sees of a text: the ``mean`` of its hidden states, that of its ``first`` token, or that
            of its ``last`` one (causal models).
        head: ``centroids`` starts the head as the nearest-centroid classifier of the training data.
        centroid_examples: training examples per class that the centroids are made of, at most.
        label_words: for causal models, instead of pooling and head: by label, the word that completes the data's
            ``prompt`` for it, with its leading space if it has one. Must be one token.
        lora: train low-rank adapters and the head only: arguments of ``peft.LoraConfig``, such as ``{r: 8}``.
        trainable: train only parameters whose names match one of these patterns, such as ``["head.*"]`` or
            ``["*.bias", "head.*"]``; null for all.
        attn_implementation: which attention kernel the model uses.

    Raises:
        InvalidArgumentError: an argument is outside its range, or does not go with another or with the data.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        num_labels: int | None = None,
        pooling: Literal["mean", "first", "last"] = "mean",
        head: Literal["random", "centroids"] = "random",
        centroid_examples: int = 128,
        label_words: dict[str, str] | None = None,
        lora: dict[str, Any] | None = None,
        trainable: list[str] | None = None,
        attn_implementation: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        super().__init__()
        if num_labels is not None and num_labels < 2:
            raise InvalidArgumentError(f"num_labels={num_labels} must be at least 2, or null to ask the data")
        if centroid_examples < 1:
            raise InvalidArgumentError(f"centroid_examples={centroid_examples} must be at least 1")
        if label_words is not None and head == "centroids":
            raise InvalidArgumentError(f"head={head!r} with label_words: there is no head, the words are the classes")
        if lora is not None and trainable is not None:
            raise InvalidArgumentError(f"trainable={trainable!r} with lora: adapters and head are what is trained then")
        self.save_hyperparameters()
        kind = AutoModelForCausalLM if label_words is not None else AutoModel
        self.model: Any = load_model(kind, config, pretrained, attn_implementation)
        if lora is not None:
            self.model = with_adapters(self.model, lora)
        elif getattr(self.model, "pooler", None) is not None:
            self.model.pooler.requires_grad_(False)  # its output is not used here
        self.model.train()  # from_pretrained returns it in eval mode, and Lightning leaves modes as they are
        self.label_tokens: Tensor
        self.head: nn.Linear | None = None
        self.label_names: list[str] = []
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def configure_model(self) -> None:
        """Make what depends on the number of classes: head or label words, and metrics. Lightning calls it."""
        data = getattr(self._trainer, "datamodule", None)  # none where a checkpoint is loaded without a Trainer
        num_labels = self._num_labels(data)
        if hasattr(self, "val_accuracy"):  # a second fit goes on with the head of the first
            return
        self.hparams["num_labels"] = num_labels  # so that a checkpoint can be loaded without the data
        self.label_names = list(getattr(data, "label_names", ()))
        if self.hparams["label_words"] is not None:
            self.register_buffer("label_tokens", torch.zeros(num_labels, dtype=torch.int64))
            if data is not None:
                self.label_tokens.copy_(torch.tensor(self._tokens_of_labels(data)))
        else:
            text_config = self.model.config.get_text_config()
            self.head = nn.Linear(text_config.hidden_size, num_labels, dtype=torch.float32)
            nn.init.normal_(self.head.weight, std=getattr(text_config, "initializer_range", 0.02))
            nn.init.zeros_(self.head.bias)
            # A checkpoint brings its own head.
            if self.hparams["head"] == "centroids" and data is not None and self.trainer.ckpt_path is None:
                self._start_from_centroids(data, num_labels)
        if self.hparams["trainable"] is not None:
            self._freeze_all_but(self.hparams["trainable"])
        self.val_accuracy = Accuracy(task="multiclass", num_classes=num_labels)
        self.test_accuracy = Accuracy(task="multiclass", num_classes=num_labels)

    def _freeze_all_but(self, patterns: list[str]) -> None:
        names = [name for name, _ in self.named_parameters()]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise InvalidArgumentError(
                    f"trainable={patterns!r}: no parameter's name matches {pattern!r}; names are like {names[0]!r} and "
                    f"{names[-1]!r}"
                )
        for name, param in self.named_parameters():
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                param.requires_grad_(False)

    def _num_labels(self, data: Any) -> int:
        given: int | None = self.hparams["num_labels"]
        of_data: int | None = getattr(data, "num_labels", None)
        number = given if given is not None else of_data
        if number is None:
            raise InvalidArgumentError(
                f"num_labels=null, and {type(data).__name__ if data is not None else 'no data module'} has no "
                "num_labels to take it from: set model.init_args.num_labels"
            )
        if of_data is not None and number != of_data:
            raise InvalidArgumentError(
                f"num_labels={given}, but the data has {of_data} labels: set it to null, or use the data that the "
                "checkpoint was trained on"
            )
        return number

    def _tokens_of_labels(self, data: Any) -> list[int]:
        words = self.hparams["label_words"]
        if not (callable(getattr(data, "tokens_of", None)) and getattr(data, "label_names", None)):
            raise InvalidArgumentError(
                f"label_words={words!r} needs a data module that has label_names and tokens_of(word), such as "
                f"lowbit_lightning.data.LabeledText; {type(data).__name__} has not"
            )
        if sorted(words) != sorted(data.label_names):
            raise InvalidArgumentError(
                f"label_words={words!r} must have one word for each label of the data: {data.label_names}"
            )
        tokens = {label: data.tokens_of(words[label]) for label in data.label_names}
        for label, of_word in tokens.items():
            if len(of_word) != 1:
                raise InvalidArgumentError(
                    f"label_words: {words[label]!r} for {label!r} is {len(of_word)} tokens, only the first of which "
                    "could be scored. Choose a word that is one token, often one with a leading space"
                )
        if len({token for (token,) in tokens.values()}) < len(tokens):
            raise InvalidArgumentError(f"label_words={words!r}: two labels have the same word")
        return [tokens[label][0] for label in data.label_names]

    @torch.no_grad()
    def _start_from_centroids(self, data: Any, num_labels: int) -> None:
        wanted = self.hparams["centroid_examples"]
        device = self.trainer.strategy.root_device
        self.to(device)
        seen = torch.zeros(num_labels, dtype=torch.int64)
        features, labels = [], []
        self.model.eval()
        with isolate_rng():  # a loader may draw from the global generators
            for batch in data.train_dataloader():
                needed = seen[batch["labels"]] < wanted
                if needed.any():
                    seen += torch.bincount(batch["labels"], minlength=num_labels)
                    labels.append(batch["labels"])
                    batch = {name: value.to(device) for name, value in batch.items()}
                    features.append(self._pooled(batch["input_ids"], batch["attention_mask"]).float())
                if (seen >= wanted).all():
                    break
        self.model.train()
        if not seen.all():
            missing = [str(self.label_names[i] if self.label_names else i) for i in (seen == 0).nonzero().flatten()]
            raise InvalidArgumentError(
                f"head='centroids': no training example of {', '.join(missing)}. Use head='random', or give examples"
            )
        head = cast(nn.Linear, self.head)
        weight, bias = centroid_head(torch.cat(features), torch.cat(labels).to(device), num_labels)
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        rank_zero_info(f"The head starts from the class means of {int(seen.sum())} training examples.")

    def _pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one vector per text, (batch, width)."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        match self.hparams["pooling"]:
            case "mean":
                mask = attention_mask[..., None].to(hidden.dtype)
                return (hidden * mask).sum(1) / mask.sum(1)
            case "first":
                return hidden[:, 0]
            case _:
                return hidden[torch.arange(len(hidden), device=hidden.device), _last(attention_mask)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (batch, labels) of token ids (batch, length) int64, padded on the right."""
        if self.head is not None:
            logits: Tensor = self.head(self._pooled(input_ids, attention_mask))
            return logits
        options, row = {}, _last(attention_mask)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            # The logits of every position would be most of the memory of a forward pass.
            options["logits_to_keep"], row = torch.unique(row, return_inverse=True)
        words: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options
        ).logits
        return words[torch.arange(len(words), device=words.device), row][:, self.label_tokens]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy in nats."""
        loss = cross_entropy(self(batch["input_ids"], batch["attention_mask"]).float(), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_start(self) -> None:
        """Start the split's metrics anew: what `validate` left in them are inference tensors, which fit cannot use."""
        self.val_loss.reset()
        self.val_accuracy.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the split's metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the split's metrics."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, labels = self(batch["input_ids"], batch["attention_mask"]).float(), batch["labels"]
        for name, values in (("loss", (cross_entropy(logits, labels), len(labels))), ("accuracy", (logits, labels))):
            metric = getattr(self, f"{stage}_{name}")
            metric.update(*values)
            self.log(f"{stage}_{name}", metric, prog_bar=name == "accuracy")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str] | Tensor:
        """Return the name of each text's class, or its number where the data has no ``label_names``."""
        numbers = self(batch["input_ids"], batch["attention_mask"]).argmax(1)
        return [self.label_names[number] for number in numbers.tolist()] if self.label_names else numbers

    def on_fit_start(self) -> None:
        """Check that the data's tokens and texts fit.

        Raises:
            InvalidArgumentError: the data yields tokens or positions that the model has no embedding for.
        """
        data = getattr(self.trainer, "datamodule", None)
        config = self.model.config.get_text_config()
        for ours, limit, of_data in (
            ("vocab_size", self.model.get_input_embeddings().num_embeddings, getattr(data, "vocab_size", None)),
            ("max_length", getattr(config, "max_position_embeddings", None), getattr(data, "max_length", None)),
        ):
            if limit is not None and of_data is not None and of_data > limit:
                raise InvalidArgumentError(
                    f"{ours}={of_data} of the data is beyond the model's {limit}: does data.init_args.tokenizer name "
                    "the model's own tokenizer, and max_length fit it?"
                )


def _last(attention_mask: Tensor) -> Tensor:
    """Return the position of each row's last token, (batch,)."""
    return attention_mask.sum(1) - 1
