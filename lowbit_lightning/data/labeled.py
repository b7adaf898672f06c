"""What the data modules for classification share: texts and labels in, batches of tokens out.

Fine-tuning sets are small, so they are tokenized once and held in memory. Where texts come from is the subclass's
business; how they are split is too, and no text may be in both parts.
"""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from lowbit_lightning.data.in_memory import Collate, ExamplesInMemory
from lowbit_lightning.data.module import Part, progress_bar
from lowbit_lightning.data.padding import TokenizedExamples, padded
from lowbit_lightning.data.tokens import load_tokenizer
from lowbit_lightning.errors import CorpusError, InvalidArgumentError

_TEXT = "{text}"


class Example(NamedTuple):
    """One text with its label.

    Attributes:
        text: without the prompt.
        label: the class's name.
        place: where it was found, for messages.
    """

    text: str
    label: str
    place: str


class LabeledExamples(ExamplesInMemory):
    """Base of the data modules for classification.

    Batches are ``{"input_ids": int64 (batch, length), "attention_mask": int64 (batch, length), "labels": int64
    (batch,)}``, padded on the right to the longest text of the batch. ``test`` and ``predict`` read the validation
    part.

    Args:
        tokenizer: Path or name of a Hugging Face tokenizer; that of the model to be trained.
        prompt: What the model reads, with ``{text}`` where the text goes.
        max_length: Tokens per example with prompt and special tokens. Longer texts lose their end, prompts never do.
        batch_size: Examples per batch and device.
        val_fraction: Expected share of examples held out for validation, between 0 and 1.
        seed: Seed of the order in which training examples are visited. The split does not depend on it.
        num_workers: Processes that prepare batches. 0 is best here: texts are tokenized already.

    Raises:
        InvalidArgumentError: An argument is outside its range.
    """

    def __init__(
        self,
        tokenizer: str,
        prompt: str,
        max_length: int,
        batch_size: int,
        val_fraction: float,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__({"max_length": (max_length, 4)}, batch_size, val_fraction, seed, num_workers)
        if prompt.count(_TEXT) != 1:
            raise InvalidArgumentError(f"prompt={prompt!r} must contain {_TEXT} once, where the text goes.")
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        self._label_names: list[str] = []

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.tokenizer)
        if not tokenizer.is_fast:
            raise InvalidArgumentError(
                f"tokenizer={self.tokenizer!r} has no tokenizer.json: texts cannot be cut at a token without one."
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens, holes in their numbering counted."""
        largest: int = max(self._tokenizer.get_vocab().values())
        return 1 + largest

    @property
    def label_names(self) -> list[str]:
        """The classes in the order of their numbers, after ``setup``: numbers by value, other names by alphabet."""
        return self._label_names

    @property
    def num_labels(self) -> int:
        """Number of classes, after ``setup``."""
        return len(self._label_names)

    def tokens_of(self, word: str) -> list[int]:
        """Tokens of a piece of text, without special ones."""
        tokens: list[int] = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        return tokens

    @abstractmethod
    def load(self) -> dict[Part, list[Example]]:
        """Read the examples of both parts.

        Raises:
            CorpusError: They cannot be used.
        """

    def setup(self, stage: str) -> None:
        """Read and tokenize, the first time."""
        if self._datasets:
            return
        examples = self.load()
        names = sorted({example.label for example in examples["train"]}, key=_by_value)
        if len(names) < 2:
            raise CorpusError(
                f"the training examples have {len(names)} label{'' if len(names) == 1 else 's'}"
                f" ({', '.join(map(repr, names)) or 'none'}), at least 2 are needed to tell apart;"
                f" the first example is in {examples['train'][0].place if examples['train'] else 'no file'}."
            )
        numbers = {name: number for number, name in enumerate(names)}
        for example in examples["validation"]:
            if example.label not in numbers:
                raise CorpusError(
                    f"{example.place}: the validation label {example.label!r} is not among the training labels: "
                    f"{_shortened(names)}."
                )
        datasets: dict[Part, Dataset[Any]] = {}
        for part, of_part in examples.items():
            with progress_bar(f"Tokenizing {part} texts", sum(len(example.text) for example in of_part)) as bar:
                rows = []
                for example in of_part:
                    rows.append(self._encode(example))
                    bar.update(len(example.text))
            datasets[part] = TokenizedExamples(rows, [numbers[example.label] for example in of_part])
        self._label_names, self._datasets = names, datasets

    def _encode(self, example: Example) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """Tokens of one example in its prompt, at most ``max_length``."""
        before, after = self.prompt.split(_TEXT)
        tokens = self._tokenizer(before + example.text + after, verbose=False)["input_ids"]
        if len(tokens) > self.max_length:
            overhead = len(self._tokenizer(before + after)["input_ids"])
            ends = self._tokenizer(example.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
            # Tokens may merge otherwise where a text is cut, so that the first cut is rarely one token too long.
            for room in range(min(self.max_length - overhead, len(ends)), 0, -1):
                tokens = self._tokenizer(before + example.text[: ends[room - 1][1]] + after)["input_ids"]
                if len(tokens) <= self.max_length:
                    break
            else:
                raise CorpusError(
                    f"{example.place}: the prompt alone takes {overhead} tokens, which leaves no room for a text with "
                    f"max_length={self.max_length}. Raise max_length or shorten the prompt."
                )
        if not tokens:
            raise CorpusError(f"{example.place}: the text {example.text[:40]!r} has no tokens. Remove the example.")
        return np.array(tokens, dtype=np.int32)

    def collate(self) -> Collate:
        """Return what pads a batch."""
        return functools.partial(padded, pad_token=self._tokenizer.pad_token_id or 0)


def _by_value(name: str) -> tuple[bool, int, str]:
    is_number = name.removeprefix("-").isdecimal()
    return not is_number, int(name) if is_number else 0, name


def _shortened(names: Sequence[str], count: int = 10) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more
