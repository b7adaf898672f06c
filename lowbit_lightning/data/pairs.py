"""What the data modules for sequence-to-sequence models share: pairs of texts in, batches of tokens out.

As for classification, pairs are tokenized once and held in memory. Where they come from is the subclass's business.
"""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowbit_lightning.data.in_memory import Collate, ExamplesInMemory
from lowbit_lightning.data.module import Part, progress_bar
from lowbit_lightning.data.tokens import load_tokenizer
from lowbit_lightning.errors import CorpusError, InvalidArgumentError

IGNORED = -100
"""The label that Hugging Face models and torch's cross-entropy leave out of the loss."""

Tokenized = tuple[list[int], int]


class Pair(NamedTuple):
    """What a model reads and what it should answer.

    Attributes:
        source: the text that is read.
        target: the text that is to be written.
        place: where it was found, for messages.
    """

    source: str
    target: str
    place: str


class PairTokens(Protocol):
    """What the data modules need from a vocabulary."""

    vocab_size: int
    pad: int

    def encode(self, text: str, max_length: int) -> Tokenized:
        """The first tokens of a text with the end token behind them, and how many bytes of the text they stand for."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text, up to the end token and without padding."""


class PairBytes:
    """Every byte is a token; byte 0 pads and byte 1 ends a text, as T5 numbers them. Neither occurs in text."""

    vocab_size = 256
    pad, end = 0, 1

    def encode(self, text: str, max_length: int) -> Tokenized:
        """The bytes, without those that mean something else here."""
        kept = [byte for byte in text.encode(errors="replace") if byte > self.end][: max_length - 1]
        return [*kept, self.end], len(kept)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Bytes as text; ids beyond 255 (a model with a padded vocabulary may produce them) are left out."""
        ids = list(token_ids)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return bytes(token for token in ids if self.end < token < 256).decode("utf-8", errors="replace")


class PairTokenizer:
    """A Hugging Face tokenizer. Its end-of-text token, or its separator, ends each text; no other special one is added.

    Args:
        name_or_path: what ``load_tokenizer`` takes.

    Raises:
        InvalidArgumentError: it cannot be loaded, has no end token, or no tokenizer.json.
    """

    def __init__(self, name_or_path: str) -> None:
        self._tokenizer: Any = load_tokenizer(name_or_path)
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        end = next((token for token in ends if token is not None), None)
        if end is None or not self._tokenizer.is_fast:
            missing = "eos or sep token, so nothing could end a text" if end is None else "tokenizer.json"
            raise InvalidArgumentError(f"tokenizer={name_or_path!r} has no {missing}. Use another, or 'bytes'.")
        self.end: int = end
        pad = self._tokenizer.pad_token_id
        self.pad: int = end if pad is None else pad
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())  # the numbering may have holes

    def encode(self, text: str, max_length: int) -> Tokenized:
        """The first tokens; special tokens spelled out in the text are ordinary text."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        covered = text if len(ids) < max_length else text[: max((end for _, end in offsets[: max_length - 1]))]
        return [*ids[: max_length - 1], self.end], len(covered.encode(errors="replace"))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text; ids beyond the vocabulary are left out."""
        ids = list(token_ids)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        known = [token for token in ids if 0 <= token < self.vocab_size]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text


class TokenizedPairs(Dataset[dict[str, Any]]):
    """Tokens of source and target, int32 (length,) each, and the bytes of the target."""

    def __init__(self, rows: Sequence[tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]", int]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, target, num_bytes = self._rows[index]
        return {"source": torch.from_numpy(source), "target": torch.from_numpy(target), "num_bytes": num_bytes}


def padded_pairs(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    """A batch, each side padded on the right to its longest row."""
    padded = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    sources, targets = ([row[side].long() for row in rows] for side in ("source", "target"))
    return {
        "input_ids": padded(sources, padding_value=pad),
        "attention_mask": padded([torch.ones_like(row) for row in sources]),
        "labels": padded(targets, padding_value=IGNORED),
        "num_bytes": torch.tensor([row["num_bytes"] for row in rows]),
    }


class TextPairs(ExamplesInMemory):
    """Base of the data modules for sequence-to-sequence models.

    Batches are ``{"input_ids": int64 (batch, source length), "attention_mask": the same, "labels": int64 (batch, target
    length), -100 where there is nothing to predict, "num_bytes": int64 (batch,), of the targets}``, padded on the
    right. ``test`` and ``predict`` read the validation part.

    Args:
        tokenizer: ``bytes``, or path or name of a Hugging Face tokenizer, or ``package:NAME``.
        max_source_length: tokens of a source with its end; the rest of a longer one is left out.
        max_target_length: the same for targets.
        batch_size: pairs per batch and device.
        val_fraction: expected share of pairs held out for validation, between 0 and 1.
        seed: seed of the order in which training pairs are visited. The split does not depend on it.
        num_workers: processes that prepare batches. 0 is best here: texts are tokenized already.

    Raises:
        InvalidArgumentError: an argument is outside its range.
    """

    def __init__(
        self,
        tokenizer: str,
        max_source_length: int,
        max_target_length: int,
        batch_size: int,
        val_fraction: float,
        seed: int,
        num_workers: int,
    ) -> None:
        lengths = {"max_source_length": (max_source_length, 2), "max_target_length": (max_target_length, 2)}
        super().__init__(lengths, batch_size, val_fraction, seed, num_workers)
        self.tokenizer = tokenizer
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length

    @functools.cached_property
    def tokens(self) -> PairTokens:
        """The vocabulary, the same for both sides. Available before ``setup``."""
        return PairBytes() if self.tokenizer == "bytes" else PairTokenizer(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return self.tokens.vocab_size

    def decode(self, token_ids: Sequence[int] | Tensor) -> str:
        """Tokens (a list or a 1-D tensor) as text, up to the end token."""
        return self.tokens.decode(token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids)

    @abstractmethod
    def load(self) -> dict[Part, list[Pair]]:
        """Read the pairs of both parts.

        Raises:
            CorpusError: they cannot be used.
        """

    def setup(self, stage: str) -> None:
        """Read and tokenize, the first time."""
        if self._datasets:
            return
        datasets: dict[Part, Dataset[Any]] = {}
        for part, pairs in self.load().items():
            if not pairs:
                raise CorpusError(f"there is no pair for {part}: give more data, or another val_fraction.")
            with progress_bar(f"Tokenizing {part} pairs", sum(len(pair.source) for pair in pairs)) as bar:
                rows = []
                for pair in pairs:
                    rows.append(self._encode(pair))
                    bar.update(len(pair.source))
            datasets[part] = TokenizedPairs(rows)
        self._datasets = datasets

    def _encode(self, pair: Pair) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]", int]:
        source, _ = self.tokens.encode(pair.source, self.max_source_length)
        target, num_bytes = self.tokens.encode(pair.target, self.max_target_length)
        for side, ids in (("source", source), ("target", target)):
            if len(ids) < 2:  # the end token alone
                raise CorpusError(f"{pair.place}: the {side} is empty. Remove the pair.")
        return np.array(source, dtype=np.int32), np.array(target, dtype=np.int32), num_bytes

    def collate(self) -> Collate:
        """Return what pads a batch."""
        return functools.partial(padded_pairs, pad=self.tokens.pad)
