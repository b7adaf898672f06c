"""What the data modules for fine-tuning and sequence-to-sequence models share: checked arguments, loaders that resume.

Their sets are small enough to be tokenized once and held in memory. What an example is, and how several make a batch,
is the business of the subclass.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lowbit_lightning.data.module import Part, place_among_processes
from lowbit_lightning.data.resumable import ResumableDataLoader
from lowbit_lightning.errors import InvalidArgumentError

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


class ExamplesInMemory(LightningDataModule):
    """Base of the data modules that hold tokenized examples; ``setup`` of a subclass fills ``_datasets``.

    ``test`` and ``predict`` read the validation part.

    Args:
        lengths: by argument, a number of tokens and the least that makes sense.
        batch_size: Examples per batch and device.
        val_fraction: Expected share of examples held out for validation, between 0 and 1.
        seed: Seed of the order in which training examples are visited. The split does not depend on it.
        num_workers: Processes that prepare batches. 0 is best here: texts are tokenized already.

    Raises:
        InvalidArgumentError: An argument is outside its range.
    """

    def __init__(
        self, lengths: Mapping[str, tuple[int, int]], batch_size: int, val_fraction: float, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        for name, (value, least) in {**lengths, "batch_size": (batch_size, 1), "num_workers": (num_workers, 0)}.items():
            if value < least:
                raise InvalidArgumentError(f"{name}={value} must be at least {least}.")
        if not 0 < val_fraction < 1:
            raise InvalidArgumentError(f"val_fraction={val_fraction} must lie between 0 and 1, both excluded.")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self._datasets: dict[Part, Dataset[Any]] = {}

    @abstractmethod
    def collate(self) -> Collate:
        """Return what makes a batch of examples; it goes to worker processes."""

    def train_dataloader(self) -> ResumableDataLoader:
        """Batches of the training part in a new order every epoch. A short last one is dropped unless it is alone."""
        dataset = self._datasets["train"]
        _, world_size = place_among_processes()
        return self._loader(dataset, shuffle=True, drop_last=len(cast(Sized, dataset)) >= self.batch_size * world_size)

    def val_dataloader(self) -> ResumableDataLoader:
        """Batches of the validation part, in order and without leaving any out."""
        return self._loader(self._datasets["validation"])

    def test_dataloader(self) -> ResumableDataLoader:
        """The validation batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ResumableDataLoader:
        """The validation batches."""
        return self.val_dataloader()

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False, drop_last: bool = False) -> ResumableDataLoader:
        return ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=self.collate(),
            pin_memory=torch.cuda.is_available(),
        )
