"""Tokenized examples of different lengths, and batches of them."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class TokenizedExamples(Dataset[tuple[Tensor, int]]):
    """Pairs of tokens, int64 (length,), and the number of the label.

    Args:
        rows: tokens of each example, int32 (length,).
        labels: numbers.
    """

    def __init__(self, rows: Sequence["np.ndarray[Any, np.dtype[np.int32]]"], labels: Sequence[int]) -> None:
        self._rows = rows
        self._labels = labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self._rows[index].astype(np.int64)), self._labels[index]


def padded(pairs: Sequence[tuple[Tensor, int]], pad_token: int) -> dict[str, Tensor]:
    """A batch, padded on the right to its longest row."""
    rows = [tokens for tokens, _ in pairs]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(rows, padding_value=pad_token),
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
        "labels": torch.tensor([label for _, label in pairs]),
    }
