"""Loss, perplexity and bits per byte of a language model over a whole split, summed exactly over batches and ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class LanguageModelMetrics(Metric):
    """Accumulates the negative log-likelihood of tokens and the bytes of text that they stand for.

    Bits per byte compares models over any tokenizer: total nats / ln 2 / bytes of text.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # fp64: an fp32 sum stops growing properly after some ten million tokens.
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor, num_bytes: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            nll: sum of the negative log-likelihoods in nats, 0-d.
            tokens: number of predicted tokens, 0-d.
            num_bytes: bytes of text behind them, any shape, summed; None where the data does not know.
        """
        # Not in place: what `validate` leaves behind are inference tensors, which fit may read and not write to.
        self.nll = self.nll + nll.double()
        self.tokens = self.tokens + tokens
        if num_bytes is not None:
            self.bytes = self.bytes + num_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss`` (nats per token), ``perplexity`` and, where bytes are known, ``bits_per_byte``; fp32, 0-d."""
        loss = (self.nll / self.tokens).float()
        metrics = {"loss": loss, "perplexity": loss.exp()}
        if self.bytes > 0:
            metrics["bits_per_byte"] = (self.nll / self.bytes).float() / torch.log(torch.tensor(2.0))
        return metrics
