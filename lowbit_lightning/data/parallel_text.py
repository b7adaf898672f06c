"""A user's own parallel text: tables in .csv, .tsv, .jsonl or .parquet files, a source and its target to a row."""

from collections.abc import Iterator

from lowbit_lightning.data.files import find_files, read_rows, text_of
from lowbit_lightning.data.module import Part
from lowbit_lightning.data.pairs import Pair, TextPairs
from lowbit_lightning.data.split import is_validation
from lowbit_lightning.errors import CorpusError

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


class ParallelText(TextPairs):
    """Pairs of texts, such as sentences and their translations, in .csv, .tsv, .jsonl and .parquet files.

    Args:
        train: globs or paths of the training files; ``**`` goes into subfolders.
        val: globs or paths of the validation files. null holds out training pairs, by a hash of their source, so that
            several targets of one source stay together.
        source_field: field of .jsonl or column of the others that holds what the model reads; tables have a first line
            of names.
        target_field: the same for what it should write.
        tokenizer: ``bytes``, or path or name of a Hugging Face tokenizer, or ``package:NAME``.
        max_source_length: tokens of a source with its end; the rest of a longer one is left out.
        max_target_length: the same for targets.
        batch_size: pairs per batch and device.
        val_fraction: expected share of pairs held out when ``val`` is null, between 0 and 1.
        seed: seed of the order in which training pairs are visited. The split does not depend on it.
        num_workers: processes that prepare batches. 0 is best here: texts are tokenized already.

    Raises:
        InvalidArgumentError: an argument is outside its range.
    """

    def __init__(
        self,
        train: list[str],
        val: list[str] | None = None,
        source_field: str = "source",
        target_field: str = "target",
        tokenizer: str = "bytes",
        max_source_length: int = 256,
        max_target_length: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_source_length, max_target_length, batch_size, val_fraction, seed, num_workers)
        self.train = train
        self.val = val
        self.source_field = source_field
        self.target_field = target_field

    def load(self) -> dict[Part, list[Pair]]:
        """Read all files."""
        files = find_files(self.train, "train", _SUFFIXES)
        pairs = [pair for path in files for pair in self._read(path)]
        if self.val is None:
            parts: dict[Part, list[Pair]] = {"train": [], "validation": []}
            for pair in pairs:
                held_out = is_validation(pair.source.encode(), self.val_fraction)
                parts["validation" if held_out else "train"].append(pair)
            return parts
        held_out_files = find_files(self.val, "val", _SUFFIXES)
        if both := sorted(set(files) & set(held_out_files)):
            raise CorpusError(
                f"'{both[0]}' is matched by both train and val ({len(both)} such files). Narrow the globs."
            )
        return {"train": pairs, "validation": [pair for path in held_out_files for pair in self._read(path)]}

    def _read(self, path: str) -> Iterator[Pair]:
        fields = {"source_field": self.source_field, "target_field": self.target_field}
        for cells in read_rows(path, fields):
            source, target = (
                text_of(cell, argument).decode(errors="replace") for cell, argument in zip(cells, fields, strict=True)
            )
            for cell, text in zip(cells, (source, target), strict=True):
                if not text.strip():
                    raise CorpusError(f"{cell.place} is empty: a pair has two sides. Remove the row.")
            yield Pair(source, target, cells[0].place)
