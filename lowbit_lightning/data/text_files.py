"""A user's own text: files of four formats, as bytes or through any Hugging Face tokenizer, in memory or streamed."""

import functools
import os
from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import Dataset

from lowbit_lightning.data.files import find_files, read_documents
from lowbit_lightning.data.module import PackedText, Part, place_among_processes, progress_bar
from lowbit_lightning.data.packing import EncodedDocument, Prompts, Windows, pack
from lowbit_lightning.data.split import is_validation
from lowbit_lightning.data.streaming import StreamedWindows
from lowbit_lightning.data.tokens import Tokens, load_tokens
from lowbit_lightning.errors import CorpusError


class TextFiles(PackedText):
    """Language modelling on .txt, .md, .jsonl and .parquet files.

    A .txt or .md file is one document, a .jsonl file has one per line and a .parquet file one per row.

    Args:
        train: Globs or paths of the training files; ``**`` goes into subfolders.
        val: Globs or paths of the validation files. null holds out documents of the training files, by a hash of
            their content.
        field: Field of .jsonl or column of .parquet that holds the text.
        tokenizer: ``bytes``, or the path or name of a Hugging Face tokenizer.
        seq_len: Tokens per window, at least 2.
        batch_size: Windows per batch and device.
        val_fraction: Expected share of documents held out when ``val`` is null, between 0 and 1.
        streaming: Read documents while training instead of before it, for files larger than memory. Shuffles within
            a bounded buffer, and cuts .txt and .md files into documents of about 1 MiB. The trainer needs max_steps
            or max_epochs, since the number of batches is not known.
        shuffle: Whether the training order changes with every epoch.
        seed: Seed of that order. The split does not depend on it.
        num_workers: Processes that prepare batches. 0 prepares them in the training process.

    Raises:
        InvalidArgumentError: An argument is outside its range.
    """

    def __init__(
        self,
        train: list[str],
        val: list[str] | None = None,
        field: str = "text",
        tokenizer: str = "bytes",
        seq_len: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        streaming: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(seq_len, batch_size, val_fraction, seed, num_workers, shuffle)
        self.train = train
        self.val = val
        self.field = field
        self.tokenizer = tokenizer
        self.streaming = streaming
        self._files: dict[Part, list[str]] = {}
        self._windows: dict[Part, Windows] = {}

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The vocabulary, loaded when first asked for."""
        return load_tokens(self.tokenizer)

    def load(self) -> Prompts:
        """Find the files; read and pack them, or look only at their beginning if they are streamed."""
        train = find_files(self.train, "train")
        val = find_files(self.val, "val") if self.val is not None else train
        if self.val is not None and (both := sorted(set(train) & set(val))):
            raise CorpusError(
                f"'{both[0]}' is matched by both train and val ({len(both)} such files). Narrow the globs."
            )
        self._files = {"train": train, "validation": val}
        if self.streaming:
            return self._probe()
        documents = self._read_all()
        if not any(documents.values()):
            raise CorpusError(f"there is no text in {self._origin('train')}: every document is empty.")
        for part, texts in documents.items():
            if not texts:
                raise CorpusError(self._no_documents(part))
            stream = self.encode_in_memory(texts, part)
            texts.clear()  # before the next part needs memory
            self._windows[part] = self.windows(stream, part, self._origin(part))
        return self.make_prompts(stream)

    def dataset(self, part: Part) -> Dataset[dict[str, Tensor]]:
        """The windows of one part: in memory, or a stream for this process's rank."""
        return self._streamed(part, shuffle=self.shuffle and part == "train") if self.streaming else self._windows[part]

    def _read_all(self) -> dict[Part, list[bytes]]:
        documents: dict[Part, list[bytes]] = {"train": [], "validation": []}
        held_out = set(self._files["validation"])
        paths = sorted({*self._files["train"], *held_out})
        with progress_bar("Reading text", sum(map(_size, paths))) as bar:
            for path in paths:
                for document in read_documents(path, self.field):
                    validation = (
                        path in held_out if self.val is not None else is_validation(document, self.val_fraction)
                    )
                    documents["validation" if validation else "train"].append(document)
                    bar.update(len(document))
        return documents

    def _probe(self) -> Prompts:
        """Find now what would otherwise fail hours later, and the prompts, without reading the whole corpus."""
        for path in {*self._files["train"], *self._files["validation"]}:
            if not os.access(path, os.R_OK):
                raise CorpusError(f"'{path}' cannot be read: it is a broken link, or its permissions forbid it.")
        for part in self._files:
            documents = _opening(self.tokens.encode(self._streamed(part).documents()), self.batch_size, self.seq_len)
            stream = pack(documents, self.tokens.boundary, self.tokens.vocab_size)
            if len(stream.tokens) == 1:
                raise CorpusError(self._no_documents(part))
            self.windows(stream, part, self._origin(part))
        return self.make_prompts(stream)

    def _streamed(self, part: Part, shuffle: bool = False) -> StreamedWindows:
        rank, world_size = place_among_processes()
        return StreamedWindows(
            self._files[part],
            self.field,
            self.tokens,
            self.seq_len,
            functools.partial(_belongs, part=part, val_fraction=self.val_fraction if self.val is None else None),
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def _origin(self, part: Part) -> str:
        patterns = self.val if part == "validation" and self.val is not None else self.train
        return f"{len(self._files[part])} file(s) that match {patterns}"

    def _no_documents(self, part: Part) -> str:
        if self.val is not None:
            return f"there is no {part} text in {self._origin(part)}: every document is empty."
        return (
            f"no document for {part}: {self._origin(part)} hold too few with text in them to be split with "
            f"val_fraction={self.val_fraction}. Name validation files with `val`, or change val_fraction. "
            "A .txt or .md file is one document."
        )


def _belongs(document: bytes, part: Part, val_fraction: float | None) -> bool:
    """Whether a document is of this part; without a fraction the files alone decide."""
    return val_fraction is None or is_validation(document, val_fraction) is (part == "validation")


def _opening(documents: Iterator[EncodedDocument], count: int, num_tokens: int) -> Iterator[EncodedDocument]:
    """The first documents: ``count`` of them, and more if they do not hold ``num_tokens`` together."""
    for document in documents:
        yield document
        count -= 1
        num_tokens -= len(document.tokens)
        if count <= 0 and num_tokens <= 0:
            return


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0
