"""CausalLM: any Hugging Face causal language model as a LightningModule, from scratch or from pretrained weights.

It brings no optimizer: the YAML says which. Nothing in here knows of the techniques of this project, so it also shows
what a module looks like that gains them without a changed line.
"""

import time
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.models.hugging_face import load_model
from lowbit_lightning.models.language_metrics import LanguageModelMetrics

_IGNORED = -100  # the label that Hugging Face data uses for tokens not to be predicted


class CausalLM(LightningModule):
    """A causal language model trained on next-token prediction.

    Logs ``train_loss``, ``tokens_per_second``, ``val_loss``, ``val_perplexity`` and ``val_bits_per_byte`` (where the
    batch has ``num_bytes``), the latter three for ``test_`` too.

    Args:
        config: a Hugging Face configuration to train from scratch: ``model_type`` (llama, gpt2, mistral, ...) and any
            of that architecture's settings.
        pretrained: pretrained weights instead of ``config``: a folder, a hub name, or ``package:NAME`` for those in an
            installed Python package.
        attn_implementation: which attention kernel the model uses.
        gradient_checkpointing: recompute activations in backward instead of keeping them.
        max_new_tokens: length of a continuation made by ``predict``.
        temperature: of sampling in ``predict``; 0 takes the likeliest token each time.

    Raises:
        InvalidArgumentError: neither or both of ``config`` and ``pretrained``, or one that cannot be loaded.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa",
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = load_model(AutoModelForCausalLM, config, pretrained, attn_implementation)
        self.model.loss_type = "ForCausalLM"  # which the names of some classes do not tell transformers
        self.model.train()  # from_pretrained returns it in eval mode, and Lightning leaves modes as they are
        if gradient_checkpointing:
            # transformers renamed it in the course of version 5.
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)()
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.val_metrics = LanguageModelMetrics()
        self.test_metrics = LanguageModelMetrics()
        self._tokens_seen = 0
        self._last_step = 0
        self._clock = time.perf_counter()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (batch, length, vocabulary) of token ids (batch, length) int64."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def _nll(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood in nats and the number of predicted tokens, both 0-d."""
        logits = self(batch["input_ids"], batch.get("attention_mask"))
        labels = batch["labels"]
        # The model's own loss, which a technique may have replaced; it divides by what it is told, or by the tokens.
        nll = self.model.loss_function(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=1)
        return nll, (labels[:, 1:] != _IGNORED).sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss in nats per token."""
        nll, tokens = self._nll(batch)
        loss = nll / tokens
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the split's metrics."""
        self.val_metrics.update(*self._nll(batch), batch.get("num_bytes"))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the split's metrics."""
        self.test_metrics.update(*self._nll(batch), batch.get("num_bytes"))

    def on_validation_epoch_end(self) -> None:
        """Log the split's metrics."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the split's metrics."""
        self._log_metrics("test", self.test_metrics)

    def _log_metrics(self, stage: str, metrics: LanguageModelMetrics) -> None:
        for name, value in metrics.compute().items():
            self.log(f"{stage}_{name}", value, prog_bar=name == "bits_per_byte")
        metrics.reset()

    def on_fit_start(self) -> None:
        """Check that the data's vocabulary fits.

        Raises:
            InvalidArgumentError: the data yields token ids that the model has no embedding for.
        """
        data_size = getattr(self.trainer.datamodule, "vocab_size", None)  # type: ignore[attr-defined]
        model_size = self.model.get_input_embeddings().num_embeddings
        if data_size is not None and data_size > model_size:
            raise InvalidArgumentError(
                f"vocab_size={model_size} of the model is smaller than the {data_size} tokens of the data: "
                f"set model.init_args.config.vocab_size to at least {data_size}"
            )

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Start the throughput clock anew after a pause for validation or checkpoints."""
        if self._tokens_seen == 0:
            self._clock = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log tokens per second over all ranks, measured between two logged steps."""
        self._tokens_seen += batch["input_ids"].numel() * self.trainer.world_size
        stepped = self.trainer.global_step != self._last_step  # not within a window of accumulation
        self._last_step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and every > 0 and self.trainer.global_step % every == 0:  # 0 is never
            self.log("tokens_per_second", self._tokens_seen / (time.perf_counter() - self._clock))
            self._tokens_seen = 0

    def on_validation_start(self) -> None:
        """Leave the time of validation out of the throughput."""
        self._tokens_seen = 0

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str] | Tensor:
        """Continue prompts.

        Args:
            batch: ``input_ids`` (batch, length) int64 and optionally ``attention_mask``.
            batch_idx: unused.

        Returns:
            The decoded texts, prompt included, where the data module can ``decode``; token ids otherwise.
        """
        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        )
        eos = self.model.config.eos_token_id
        tokens: Tensor = self.model.generate(
            batch["input_ids"],
            attention_mask=batch.get("attention_mask", torch.ones_like(batch["input_ids"])),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=eos if isinstance(eos, int) else None,
            **sampling,
        )
        decode = getattr(self.trainer.datamodule, "decode", None)  # type: ignore[attr-defined]
        if decode is None:
            return tokens
        texts = [decode(row) for row in tokens.tolist()]
        for text in texts:
            self.print(f"{'─' * 80}\n{text}")
        return texts
