"""Windows over a corpus larger than memory.

Files are opened one after the other and documents leave them through a shuffle buffer of bounded size, so the memory
needed is that buffer, one document and less than one window, whatever the corpus's size. The order is a function of
(seed, epoch): the files are permuted, then the buffer mixes neighbouring documents.

Documents are divided between the workers of a loader, windows between the ranks. Every rank thus reads all documents,
which is the price of equal shares: how many windows a set of documents fills is known only once they are encoded, and
ranks with unequal numbers of batches wait for each other forever at the epoch's end.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lowbit_lightning.data.files import read_documents
from lowbit_lightning.data.packing import TokenStream, iterate_windows, predicted_bytes
from lowbit_lightning.data.tokens import Tokens

# Size at which a .txt or .md file is cut into documents: small against the buffer, large against a window.
TEXT_PART_BYTES = 2**20
# Text held for shuffling, per worker.
BUFFER_BYTES = 2**25


class StreamedWindows(IterableDataset[dict[str, Tensor]]):
    """Iterable windows, read lazily.

    An item is ``{"input_ids": int64 (seq_len,), "labels": the same, "num_bytes": int64 ()}``. The model shifts. At the
    end of an epoch, a worker's documents leave a rest of less than one window per rank, which is not used.

    Args:
        files: Files to read, as found by :func:`~lowbit_lightning.data.files.find_files`.
        field: Field of .jsonl or column of .parquet with the text.
        tokens: The vocabulary.
        seq_len: Tokens per window.
        keep: Picks the documents of this part of the corpus by their content. Sent to worker processes.
        shuffle: Whether the order changes with the epoch; otherwise files and documents come as they are.
        seed: Seed of the order.
        rank: This process's place among those that train together.
        world_size: How many there are.
        buffer_bytes: Text held for shuffling, per worker.
    """

    def __init__(
        self,
        files: Sequence[str],
        field: str,
        tokens: Tokens,
        seq_len: int,
        keep: Callable[[bytes], bool],
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._files = list(files)
        self._field = field
        self._tokens = tokens
        self._seq_len = seq_len
        self._keep = keep
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._rank = rank
        self._world_size = world_size
        self._buffer_bytes = buffer_bytes

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch

    def documents(self, worker: int = 0, num_workers: int = 1) -> Iterator[bytes]:
        """The documents of one worker in this epoch's order."""
        files = list(self._files)
        if self._shuffle:
            # The same permutation for all workers: it decides whose document is whose.
            random.Random(f"files {self._seed} {self._epoch}").shuffle(files)
        kept = (
            document
            for path in files
            for document in read_documents(path, self._field, TEXT_PART_BYTES)
            if self._keep(document)
        )
        own = (document for index, document in enumerate(kept) if index % num_workers == worker)
        if not self._shuffle:
            return own
        return shuffled(own, self._buffer_bytes, random.Random(f"documents {self._seed} {self._epoch} {worker}"))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        documents = self.documents(info.id, info.num_workers) if info else self.documents()
        encoded = self._tokens.encode(documents)
        windows = iterate_windows(encoded, self._tokens.boundary, self._tokens.vocab_size, self._seq_len)
        own = None
        for index, window in enumerate(windows):
            place = index % self._world_size
            if place == self._rank:
                own = window
            # Only once every rank has its window is the round complete; see the note on equal shares above.
            if place == self._world_size - 1 and own is not None:
                yield _item(own)


def shuffled(documents: Iterator[bytes], buffer_bytes: int, generator: random.Random) -> Iterator[bytes]:
    """The same documents in an order drawn from a buffer that holds ``buffer_bytes`` and one document at most."""
    buffer: list[bytes] = []
    held = 0
    for document in documents:
        buffer.append(document)
        held += len(document)
        while held > buffer_bytes:
            chosen = generator.randrange(len(buffer))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            held -= len(buffer[-1])
            yield buffer.pop()
    generator.shuffle(buffer)
    yield from buffer


def _item(window: TokenStream) -> dict[str, Tensor]:
    input_ids = torch.from_numpy(window.tokens.astype("int64"))
    return {
        "input_ids": input_ids,
        "labels": input_ids.clone(),
        "num_bytes": torch.tensor(predicted_bytes(window)),
    }
