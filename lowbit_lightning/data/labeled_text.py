"""A user's own labelled texts: tables in .csv, .jsonl or .parquet files, one example to a row."""

from collections.abc import Iterator

from lowbit_lightning.data.files import Cell, find_files, read_rows, text_of
from lowbit_lightning.data.labeled import Example, LabeledExamples
from lowbit_lightning.data.module import Part
from lowbit_lightning.data.split import is_validation
from lowbit_lightning.errors import CorpusError

_SUFFIXES = (".csv", ".jsonl", ".parquet")


class LabeledText(LabeledExamples):
    """Classification of texts in .csv, .jsonl and .parquet files.

    Args:
        train: Globs or paths of the training files; ``**`` goes into subfolders.
        tokenizer: Path or name of a Hugging Face tokenizer, or ``package:NAME``; that of the model to be trained.
        val: Globs or paths of the validation files. null holds out training examples, by a hash of their text.
        text_field: Field of .jsonl or column of .csv and .parquet that holds the text.
        label_field: The same for the label: names, or whole numbers.
        prompt: What the model reads, with ``{text}`` where the text goes; for a model with ``label_words`` it ends
            where the label word would follow.
        max_length: Tokens per example with prompt and special tokens. Longer texts lose their end, prompts never do.
        batch_size: Examples per batch and device.
        val_fraction: Expected share of examples held out when ``val`` is null, between 0 and 1.
        seed: Seed of the order in which training examples are visited. The split does not depend on it.
        num_workers: Processes that prepare batches. 0 is best here: texts are tokenized already.

    Raises:
        InvalidArgumentError: An argument is outside its range.
    """

    def __init__(
        self,
        train: list[str],
        tokenizer: str,
        val: list[str] | None = None,
        text_field: str = "text",
        label_field: str = "label",
        prompt: str = "{text}",
        max_length: int = 128,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, prompt, max_length, batch_size, val_fraction, seed, num_workers)
        self.train = train
        self.val = val
        self.text_field = text_field
        self.label_field = label_field

    def load(self) -> dict[Part, list[Example]]:
        """Read all files."""
        files = find_files(self.train, "train", _SUFFIXES)
        examples = [example for path in files for example in self._read(path)]
        parts: dict[Part, list[Example]]
        if self.val is not None:
            held_out = find_files(self.val, "val", _SUFFIXES)
            if both := sorted(set(files) & set(held_out)):
                raise CorpusError(
                    f"'{both[0]}' is matched by both train and val ({len(both)} such files). Narrow the globs."
                )
            parts = {"train": examples, "validation": [example for path in held_out for example in self._read(path)]}
        else:
            parts = {"train": [], "validation": []}
            for example in examples:
                is_held_out = is_validation(example.text.encode(), self.val_fraction)
                parts["validation" if is_held_out else "train"].append(example)
        for part, of_part in parts.items():
            if not of_part:
                patterns = self.val if part == "validation" and self.val is not None else self.train
                raise CorpusError(
                    f"no example for {part}: the files that match {patterns} have {len(examples)} rows"
                    + (
                        f", val_fraction={self.val_fraction}. Add rows, or name files with `val`."
                        if not self.val
                        else "."
                    )
                )
        return parts

    def _read(self, path: str) -> Iterator[Example]:
        for text, label in read_rows(path, {"text_field": self.text_field, "label_field": self.label_field}):
            content = text_of(text, "text_field").decode(errors="replace")
            if not content.strip():
                raise CorpusError(f"{text.place} is empty: there is nothing to classify. Remove the row.")
            yield Example(content, _label_of(label), label.place)


def _label_of(cell: Cell) -> str:
    value = cell.value
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what a table library makes of whole numbers beside an empty cell
    if isinstance(value, str | int) and str(value).strip():
        return str(value).strip()
    found = "is empty" if value is None or value == "" else f"is {str(value)[:40]!r}"
    raise CorpusError(
        f"{cell.place} {found}: a label must be a name or a whole number. Mend the row, or name another field with "
        "`label_field`."
    )
