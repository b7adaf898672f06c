"""Documents become one stream of tokens, and the stream becomes windows of fixed length.

The stream opens with a boundary token and every document ends with one, so that the first token of a document is
predicted as well. Consecutive windows overlap by one token: a window of ``seq_len`` tokens predicts ``seq_len - 1``,
and over all windows every token after the opening boundary is predicted exactly once. Windows are always full, so what
remains at the stream's end (fewer than ``seq_len - 1`` predictions) belongs to no window.

Every token carries the number of bytes of text it stands for. That is what makes bits per byte comparable between
tokenizers: the bytes of a document's tokens add up to the document's bytes, and a boundary counts as one byte.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

TokenArray = npt.NDArray[np.unsignedinteger]
ByteCounts = npt.NDArray[np.int32]


class EncodedDocument(NamedTuple):
    """The tokens of one document, without boundaries.

    Attributes:
        tokens: (n,) unsigned integers, the smallest type that holds the vocabulary.
        num_bytes: (n,) int32, bytes of text per token. None stands for one byte each (byte-level corpora).
    """

    tokens: TokenArray
    num_bytes: ByteCounts | None = None


class TokenStream(NamedTuple):
    """Packed documents: boundary, document, boundary, document, ..., boundary.

    Attributes:
        tokens: (n,) unsigned integers.
        num_bytes: (n,) int32, bytes of text per token, or None for one byte each.
    """

    tokens: TokenArray
    num_bytes: ByteCounts | None


def compact_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned integer type that holds every token of the vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def pack(documents: Iterable[EncodedDocument], boundary: int, vocab_size: int) -> TokenStream:
    """Join the documents into one stream in memory. Documents without tokens leave no trace, not even a boundary."""
    edge = np.array([boundary], dtype=compact_dtype(vocab_size))
    one_byte = np.ones(1, dtype=np.int32)
    tokens, counts = [edge], [one_byte]
    for document in documents:
        if len(document.tokens) == 0:
            continue
        tokens += (document.tokens, edge)
        if document.num_bytes is not None:
            counts += (document.num_bytes, one_byte)
    return TokenStream(np.concatenate(tokens), np.concatenate(counts) if len(counts) > 1 else None)


def iterate_windows(
    documents: Iterable[EncodedDocument], boundary: int, vocab_size: int, seq_len: int
) -> Iterator[TokenStream]:
    """The windows of :func:`pack`'s stream, made one by one while holding one document and less than one window."""
    tokens, counts = pack([], boundary, vocab_size).tokens, np.ones(1, dtype=np.int32)
    for document in documents:
        packed = pack([document], boundary, vocab_size)
        tokens = np.concatenate([tokens, packed.tokens[1:]])
        if packed.num_bytes is not None:
            counts = np.concatenate([counts, packed.num_bytes[1:]])
        start = 0
        while start + seq_len <= len(tokens):
            window = slice(start, start + seq_len)
            yield TokenStream(tokens[window], None if document.num_bytes is None else counts[window])
            start += seq_len - 1
        tokens, counts = tokens[start:], counts[start:]


def predicted_bytes(window: TokenStream) -> int:
    """Bytes of text that the predicted tokens of a window stand for: all but the first, which is only context."""
    return len(window.tokens) - 1 if window.num_bytes is None else int(window.num_bytes[1:].sum())


class Windows(Dataset[dict[str, Tensor]]):
    """Map-style windows over a stream in memory; any window, or a whole batch of them, is one slice of an array.

    An item is ``{"input_ids": int64 (seq_len,), "labels": the same, "num_bytes": int64 ()}``. The model shifts.

    Args:
        stream: The packed documents. Their byte counts are summed per window here and not kept.
        seq_len: Tokens per window, at least 2.
    """

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self.tokens = stream.tokens
        self.seq_len = seq_len
        self._num_windows = max(0, (len(stream.tokens) - 1) // (seq_len - 1))
        self._num_bytes = np.full(self._num_windows, seq_len - 1, dtype=np.int64)
        if stream.num_bytes is not None:
            predicted = stream.num_bytes[1 : 1 + self._num_windows * (seq_len - 1)]
            self._num_bytes = predicted.reshape(self._num_windows, seq_len - 1).sum(axis=1, dtype=np.int64)

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([range(len(self))[index]]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A collated batch at once: ``input_ids`` and ``labels`` (batch, seq_len), ``num_bytes`` (batch,)."""
        rows = np.asarray(indices, dtype=np.int64)
        positions = rows[:, None] * (self.seq_len - 1) + np.arange(self.seq_len)
        input_ids = torch.from_numpy(self.tokens[positions].astype(np.int64))
        return {
            "input_ids": input_ids,
            "labels": input_ids.clone(),
            "num_bytes": torch.from_numpy(self._num_bytes[rows]),
        }


class Prompts(Dataset[dict[str, Tensor]]):
    """The openings of documents, for generation: a boundary and the tokens after it, all of one length.

    A document shorter than the prompt runs on into the next one, so a corpus of short documents has prompts as well.
    An item is ``{"input_ids": int64 (length,)}``.

    Args:
        stream: The packed documents.
        boundary: The token between documents.
        length: Tokens per prompt.
        count: At most this many prompts, from the stream's start.
    """

    def __init__(self, stream: TokenStream, boundary: int, length: int, count: int) -> None:
        starts = np.flatnonzero(stream.tokens == boundary)
        starts = starts[starts + length <= len(stream.tokens)][:count]
        self._prompts = torch.from_numpy(stream.tokens[starts[:, None] + np.arange(length)].astype(np.int64))

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._prompts[index]}
