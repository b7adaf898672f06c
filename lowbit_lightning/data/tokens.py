"""Text to tokens and back: bytes as they are, or any Hugging Face tokenizer.

Both kinds offer ``vocab_size``, ``boundary`` (the token that ends a document), ``encode`` and ``decode``. A tokenizer
also has to say how many bytes of text each of its tokens stands for, or bits per byte would be a guess: the offsets
that fast tokenizers report are turned into bytes such that a document's counts always add up to its size, whatever the
tokenizer trims, normalizes or splits.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lowbit_lightning.data.packing import ByteCounts, EncodedDocument, compact_dtype
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.pretrained import locate

# Documents per call of a tokenizer: enough to keep its threads busy, few enough to hold in memory.
TOKENIZER_BATCH = 64


class Tokens(Protocol):
    """What the data modules need from a vocabulary."""

    vocab_size: int
    boundary: int

    def encode(self, documents: Iterable[bytes]) -> Iterator[EncodedDocument]:
        """The tokens of each document, in order, read lazily."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text. Boundaries are left out; what is not valid UTF-8 is shown as the replacement character."""


class ByteTokens:
    """Every byte is a token. Byte 0 does not occur in text and ends a document, so a document's own are removed."""

    vocab_size = 256
    boundary = 0

    def __init__(self) -> None:
        self._warned = False

    def encode(self, documents: Iterable[bytes]) -> Iterator[EncodedDocument]:
        """The bytes of each document."""
        for document in documents:
            if b"\0" in document:
                if not self._warned:
                    rank_zero_warn(
                        "NUL bytes were removed from the corpus, because byte 0 marks the end of a document. "
                        "If there are many, a file may not be text."
                    )
                    self._warned = True
                document = document.replace(b"\0", b"")
            yield EncodedDocument(np.frombuffer(document, dtype=np.uint8))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Bytes as text; ids beyond 255 (a model with a padded vocabulary may produce them) are left out too."""
        return bytes(token for token in token_ids if 0 < token < 256).decode("utf-8", errors="replace")


class PretrainedTokens:
    """A Hugging Face tokenizer.

    A document ends with the tokenizer's end-of-text token, or with its separator or start token if it has no such.
    Special tokens spelled out inside a document are encoded as ordinary text by fast tokenizers, so a document cannot
    forge a boundary.

    Args:
        name_or_path: What :func:`load_tokenizer` takes.

    Raises:
        InvalidArgumentError: The tokenizer cannot be loaded, or has no token that could end a document.
    """

    def __init__(self, name_or_path: str) -> None:
        self._tokenizer: Any = load_tokenizer(name_or_path)
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id, self._tokenizer.bos_token_id)
        boundary = next((token for token in ends if token is not None), None)
        if boundary is None:
            raise InvalidArgumentError(
                f"tokenizer={name_or_path!r} has no eos, sep or bos token, so nothing could end a document. "
                "Set one (tokenizer.eos_token = ...), save the tokenizer again, or use tokenizer='bytes'."
            )
        self.boundary: int = boundary
        # Not its length: the numbering of a vocabulary may have holes.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())

    def encode(self, documents: Iterable[bytes]) -> Iterator[EncodedDocument]:
        """The tokens of each document with their bytes; bytes that are not UTF-8 become replacement characters."""
        remaining = iter(documents)
        dtype = compact_dtype(self.vocab_size)
        options: dict[str, bool] = {"add_special_tokens": False, "verbose": False}
        if self._tokenizer.is_fast:
            options |= {"return_offsets_mapping": True, "split_special_tokens": True}
        while chunk := list(islice(remaining, TOKENIZER_BATCH)):
            texts = [document.decode("utf-8", errors="replace") for document in chunk]
            encoded = self._tokenizer(texts, **options)
            for row, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
                size = len(text.encode())
                if self._tokenizer.is_fast:
                    counts = bytes_per_token(text, encoded["offset_mapping"][row])
                else:
                    # Without offsets the total is still exact; only its spread over the document is assumed even.
                    counts = np.diff(np.arange(len(ids) + 1) * size // max(1, len(ids))).astype(np.int32)
                yield EncodedDocument(np.array(ids, dtype=dtype), counts)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text, without special tokens; ids beyond the vocabulary are left out."""
        known = [token for token in token_ids if 0 <= token < self.vocab_size]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text


def bytes_per_token(text: str, offsets: Sequence[tuple[int, int]]) -> ByteCounts:
    """Bytes of UTF-8 text that each token newly covers.

    A token accounts for everything from the end of what came before it to its own end. What lies between two tokens
    (trimmed spaces) goes to the later one, what follows the last token goes to the last. Of several tokens that share
    one character, the first has all its bytes and the others none.

    Args:
        text: The document.
        offsets: (start, end) per token, in characters of ``text``.

    Returns:
        (tokens,) int32, summing to ``len(text.encode())`` if there is any token.
    """
    if not offsets:
        return np.zeros(0, dtype=np.int32)
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    ends[-1] = len(text)
    covered = np.maximum.accumulate(ends)
    # UTF-32 gives the code points as an array; their UTF-8 lengths change at these three values.
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    position = np.concatenate([[0], np.cumsum(sizes)])
    return np.diff(position[covered], prepend=0).astype(np.int32)


def load_tokens(name: str) -> Tokens:
    """``"bytes"``, or a Hugging Face tokenizer by path or name."""
    return ByteTokens() if name == "bytes" else PretrainedTokens(name)


def load_tokenizer(name_or_path: str) -> Any:
    """A Hugging Face tokenizer.

    Args:
        name_or_path: What ``AutoTokenizer.from_pretrained`` takes, or ``package:NAME``, see
            :mod:`lowbit_lightning.pretrained`.

    Raises:
        InvalidArgumentError: It cannot be loaded.
    """
    # Costs seconds, and byte-level corpora do without it.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(locate(name_or_path, "tokenizer"))
    except InvalidArgumentError:
        raise  # a ValueError too
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(
            f"tokenizer={name_or_path!r} cannot be loaded: {_first_line(error)}. Give 'bytes', the folder of a "
            "saved Hugging Face tokenizer, or a name on the Hugging Face hub (which needs a connection or a cache)."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
