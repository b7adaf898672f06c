"""What the text data modules share: checked arguments, loaders that resume, prompts and decoding.

A subclass says where documents come from (:meth:`PackedText.load`); everything after that is the same for all. The
windows are made once, in ``setup``, and the order in which they are visited is the business of
:class:`~lowbit_lightning.data.resumable.ResumableDataLoader`.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm  # type: ignore[import-untyped]

from lowbit_lightning.data.packing import Prompts, TokenStream, Windows, pack
from lowbit_lightning.data.resumable import ResumableDataLoader
from lowbit_lightning.data.tokens import Tokens
from lowbit_lightning.errors import CorpusError, InvalidArgumentError

Part = Literal["train", "validation"]


class PackedText(LightningDataModule):
    """Base of the data modules whose batches are windows over packed documents.

    Training, validation and test batches are ``{"input_ids": int64 (batch, seq_len), "labels": equal to input_ids,
    "num_bytes": int64 (batch,)}``; the model shifts the labels, and ``num_bytes`` is the text that the ``seq_len - 1``
    predicted tokens stand for. ``test`` reads the validation part: there is no third one. A prediction batch is
    ``{"input_ids": int64 (batch, seq_len // 2)}``, the openings of validation documents.

    Args:
        seq_len: Tokens per window, at least 2.
        batch_size: Windows per batch and device.
        val_fraction: Expected share of documents held out for validation, between 0 and 1.
        seed: Seed of the order in which training windows are visited. The split does not depend on it.
        num_workers: Processes that prepare batches. 0 prepares them in the training process.
        shuffle: Whether the training order changes with every epoch.

    Raises:
        InvalidArgumentError: An argument is outside its range.
    """

    def __init__(
        self, seq_len: int, batch_size: int, val_fraction: float, seed: int, num_workers: int, shuffle: bool
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InvalidArgumentError(f"{name}={value} must be at least {least}.")
        if not 0 < val_fraction < 1:
            raise InvalidArgumentError(f"val_fraction={val_fraction} must lie between 0 and 1, both excluded.")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.shuffle = shuffle
        self._prompts: Prompts | None = None

    @property
    @abstractmethod
    def tokens(self) -> Tokens:
        """The vocabulary. Available before ``setup``, so that a model's size can be linked to it."""

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return self.tokens.vocab_size

    def decode(self, token_ids: Sequence[int] | Tensor) -> str:
        """Tokens (a list or a 1-D tensor) as text, without document boundaries."""
        return self.tokens.decode(token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids)

    @abstractmethod
    def load(self) -> Prompts:
        """Read or probe the corpus, keep what :meth:`dataset` needs, and return the prompts.

        Raises:
            CorpusError: The corpus cannot be used.
        """

    @abstractmethod
    def dataset(self, part: Part) -> Dataset[dict[str, Tensor]]:
        """The windows of one part of the corpus, after :meth:`load`."""

    def setup(self, stage: str) -> None:
        """Prepare the corpus, the first time."""
        if self._prompts is None:
            self._prompts = self.load()

    def train_dataloader(self) -> ResumableDataLoader:
        """Batches of the training part. A short last batch is dropped unless it is the only one."""
        dataset = self.dataset("train")
        # The gradient of a last batch of one window would look like a spike.
        _, world_size = place_among_processes()
        drop_last = isinstance(dataset, Windows) and len(dataset) >= self.batch_size * world_size
        return self._loader(dataset, shuffle=self.shuffle, drop_last=drop_last)

    def val_dataloader(self) -> ResumableDataLoader:
        """Batches of the validation part, in order and without leaving any out."""
        return self._loader(self.dataset("validation"))

    def test_dataloader(self) -> ResumableDataLoader:
        """The validation batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ResumableDataLoader:
        """One batch of prompts from validation documents."""
        assert self._prompts is not None, "Lightning calls setup first"
        return self._loader(self._prompts)

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False, drop_last: bool = False) -> ResumableDataLoader:
        return ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            # An iterable dataset orders itself by (seed, epoch).
            shuffle=shuffle and not isinstance(dataset, IterableDataset),
            seed=self.seed,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=_already_collated if isinstance(dataset, Windows) else None,
            pin_memory=torch.cuda.is_available(),
        )

    def encode_in_memory(self, documents: Sequence[bytes], part: Part) -> TokenStream:
        """Encode and pack one part of the corpus, with a progress bar if it takes more than two seconds."""
        with progress_bar(f"Encoding {part} text", sum(map(len, documents))) as bar:
            return pack(self.tokens.encode(_watched(documents, bar)), self.tokens.boundary, self.tokens.vocab_size)

    def windows(self, stream: TokenStream, part: Part, origin: str) -> Windows:
        """The stream as windows, of which there must be at least one.

        Raises:
            CorpusError: The stream is shorter than one window. ``origin`` says where its documents come from.
        """
        if len(stream.tokens) < self.seq_len:
            raise CorpusError(
                f"the {part} text is shorter than one sequence: {len(stream.tokens)} tokens with document boundaries, "
                f"seq_len={self.seq_len}, from {origin}. Give more text, or a smaller seq_len."
            )
        return Windows(stream, self.seq_len)

    def make_prompts(self, stream: TokenStream) -> Prompts:
        """One batch of prompts of half a window, which leaves the other half for generation."""
        return Prompts(stream, self.tokens.boundary, self.seq_len // 2, self.batch_size)


def place_among_processes() -> tuple[int, int]:
    """This process's rank and the number of processes that train together, as far as they have met."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def progress_bar(description: str, total_bytes: int) -> Any:
    """A bar in bytes, shown on the first rank once the work has taken two seconds."""
    return tqdm(
        total=total_bytes,
        desc=description,
        unit="B",
        unit_scale=True,
        delay=2.0,
        leave=False,
        disable=place_among_processes()[0] > 0,
    )


def _watched(documents: Iterable[bytes], bar: Any) -> Iterable[bytes]:
    for document in documents:
        yield document
        bar.update(len(document))


def _already_collated(batch: Any) -> Any:
    return batch
