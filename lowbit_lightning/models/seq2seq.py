"""Seq2Seq: any Hugging Face encoder-decoder as a LightningModule, for translation and everything like it.

It brings no optimizer and knows nothing of the techniques of this project; see :mod:`.causal_lm`.
"""

from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.text import BLEUScore
from transformers import AutoModelForSeq2SeqLM

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.models.hugging_face import load_model
from lowbit_lightning.models.language_metrics import LanguageModelMetrics

_IGNORED = -100  # the label that Hugging Face data uses for tokens not to be predicted


class Seq2Seq(LightningModule):
    """An encoder-decoder trained to write a target text for a source text.

    Logs ``train_loss``, ``val_loss`` (nats per target token), ``val_perplexity`` and ``val_bits_per_byte`` (where the
    batch has ``num_bytes``), the latter three for ``test_`` too, and ``test_bleu`` of generated texts where the data
    module can ``decode``. Batches are ``{"input_ids", "attention_mask": int64 (batch, source length), "labels": int64
    (batch, target length), -100 where there is nothing to predict}``.

    Args:
        config: a Hugging Face configuration to train from scratch: ``model_type`` (t5, bart, ...) and any of that
            architecture's settings; its ``pad_token_id``, ``eos_token_id`` and ``decoder_start_token_id`` must suit the
            data (T5's own do for ``bytes``).
        pretrained: pretrained weights instead of ``config``: a folder, a hub name, or ``package:NAME`` for those in an
            installed Python package.
        attn_implementation: which attention kernel the model uses.
        num_beams: hypotheses that are followed when texts are generated; 1 takes the likeliest token each time.
        max_new_tokens: length of a generated text.

    Raises:
        InvalidArgumentError: neither or both of ``config`` and ``pretrained``, or one that cannot be loaded.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        attn_implementation: Literal["sdpa", "eager"] = "sdpa",
        num_beams: int = 1,
        max_new_tokens: int = 128,
    ) -> None:
        super().__init__()
        for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise InvalidArgumentError(f"{name}={value} must be at least 1")
        self.save_hyperparameters()
        self.model: Any = load_model(AutoModelForSeq2SeqLM, config, pretrained, attn_implementation)
        self.model.train()  # from_pretrained returns it in eval mode, and Lightning leaves modes as they are
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.val_metrics = LanguageModelMetrics()
        self.test_metrics = LanguageModelMetrics()
        self.test_bleu = BLEUScore()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return logits (batch, target length, vocabulary) of the tokens in ``labels``, each from those before it."""
        logits: Tensor = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits
        return logits

    def _nll(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood in nats and the number of predicted tokens, both 0-d."""
        labels = batch["labels"]
        logits = self(batch["input_ids"], batch["attention_mask"], labels).flatten(0, 1).float()
        nll = cross_entropy(logits, labels.flatten(), ignore_index=_IGNORED, reduction="sum")
        return nll, (labels != _IGNORED).sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss in nats per target token."""
        nll, tokens = self._nll(batch)
        loss = nll / tokens
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the split's metrics."""
        self.val_metrics.update(*self._nll(batch), batch.get("num_bytes"))

    def on_validation_epoch_end(self) -> None:
        """Log the split's metrics."""
        self._log_metrics("val", self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the split's metrics, and what is generated for it to the BLEU score."""
        self.test_metrics.update(*self._nll(batch), batch.get("num_bytes"))
        decode = getattr(getattr(self.trainer, "datamodule", None), "decode", None)
        if decode is not None:
            written = [decode(row) for row in self._generate(batch)]
            wanted = [[decode(row[row != _IGNORED])] for row in batch["labels"]]
            self.test_bleu.update(written, wanted)
            self.log("test_bleu", self.test_bleu, on_step=False, on_epoch=True, batch_size=len(written))

    def on_test_epoch_end(self) -> None:
        """Log the split's metrics."""
        self._log_metrics("test", self.test_metrics)

    def _log_metrics(self, stage: str, metrics: LanguageModelMetrics) -> None:
        for name, value in metrics.compute().items():
            self.log(f"{stage}_{name}", value, prog_bar=name == "loss")
        metrics.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str] | Tensor:
        """Return a text for each source, or token ids where the data module cannot ``decode``."""
        tokens = self._generate(batch)
        decode = getattr(getattr(self.trainer, "datamodule", None), "decode", None)
        return tokens if decode is None else [decode(row) for row in tokens]

    def _generate(self, batch: dict[str, Tensor]) -> Tensor:
        """Return token ids (batch, at most ``max_new_tokens``) of generated texts, without the start token."""
        tokens: Tensor = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            do_sample=False,
        )
        return tokens[:, 1:]

    def on_fit_start(self) -> None:
        """Check that the data's vocabulary fits.

        Raises:
            InvalidArgumentError: the data yields token ids that the model has no embedding for.
        """
        data_size = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        model_size = self.model.get_input_embeddings().num_embeddings
        if data_size is not None and data_size > model_size:
            raise InvalidArgumentError(
                f"vocab_size={model_size} of the model is smaller than the {data_size} tokens of the data: "
                f"set model.init_args.config.vocab_size to at least {data_size}"
            )
