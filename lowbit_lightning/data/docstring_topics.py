"""A real classification task that every machine already has: which package is this docstring from?

The docstrings of Python's standard library were written by many people over thirty years; the top-level package that
one stands in is its topic. Whole modules are held out, so that no text describes the same code as one trained on.
"""

import ast
import functools
import hashlib
import sysconfig
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lowbit_lightning.data.labeled import Example, LabeledExamples
from lowbit_lightning.data.module import Part, progress_bar
from lowbit_lightning.data.python_source import python_files
from lowbit_lightning.errors import CorpusError, InvalidArgumentError

# Shorter docstrings ("Return the name.") could stand anywhere.
_LEAST_WORDS = 5
# With fewer, a topic would be one or two files.
_LEAST_MODULES = 5
# Removed in 3.12 and 3.13: with them the task would not be the same on every Python.
_REMOVED = ("distutils", "lib2to3")

Docstrings = dict[str, dict[str, list[str]]]


class DocstringTopics(LabeledExamples):
    """Classification of the standard library's docstrings by top-level package. Works offline.

    The largest topics are taken, with as many examples from each as the smallest of them has, so that guessing gets
    1 in ``num_topics`` right. Docstrings that occur in several places are left out. The task is the same for every
    seed and on every machine with the same Python.

    Args:
        tokenizer: Path or name of a Hugging Face tokenizer, or ``package:NAME``; that of the model to be trained.
        num_topics: Number of classes, at least 2; the standard library has about 12.
        prompt: What the model reads, with ``{text}`` where the docstring goes; for a model with ``label_words`` it
            ends where the label word would follow.
        max_length: Tokens per example with prompt and special tokens. Longer texts lose their end, prompts never do.
        batch_size: Examples per batch and device.
        val_fraction: Share of each topic's docstrings held out for validation at most, between 0 and 1.
        seed: Seed of the order in which training examples are visited.
        num_workers: Processes that prepare batches. 0 is best here: texts are tokenized already.
        root: Folder with packages to use instead of the standard library.

    Raises:
        InvalidArgumentError: An argument is outside its range.
    """

    def __init__(
        self,
        tokenizer: str,
        num_topics: int = 8,
        prompt: str = "{text}",
        max_length: int = 64,
        batch_size: int = 16,
        val_fraction: float = 0.3,
        seed: int = 0,
        num_workers: int = 0,
        root: str | None = None,
    ) -> None:
        super().__init__(tokenizer, prompt, max_length, batch_size, val_fraction, seed, num_workers)
        if num_topics < 2:
            raise InvalidArgumentError(f"num_topics={num_topics} must be at least 2.")
        self.num_topics = num_topics
        self.root = Path(root).expanduser() if root is not None else Path(sysconfig.get_path("stdlib"))

    def load(self) -> dict[Part, list[Example]]:
        """Read the docstrings, choose the topics and balance them."""
        docstrings = _read(self.root)
        sizes = {topic: sum(map(len, modules.values())) for topic, modules in docstrings.items()}
        topics = sorted(sorted(sizes, key=lambda topic: (-sizes[topic], topic))[: self.num_topics])
        if len(topics) < self.num_topics:
            raise CorpusError(
                f"'{self.root}' has {len(topics)} packages with docstrings in {_LEAST_MODULES} modules or more, "
                f"num_topics={self.num_topics}. Lower it, or give another folder with `root`; without one, the "
                "standard library of the running Python is used, which must be installed as source files."
            )
        split = {topic: split_by_module(docstrings[topic], self.val_fraction) for topic in topics}
        examples: dict[Part, list[Example]] = {"train": [], "validation": []}
        for part, of_part in examples.items():
            each = min(len(split[topic][part]) for topic in topics)
            for topic in topics:
                chosen = sorted(split[topic][part], key=lambda found: _digest(found[0]))[:each]
                of_part += (Example(text, topic, str(self.root / module)) for text, module in chosen)
        return examples


def split_by_module(modules: Mapping[str, list[str]], val_fraction: float) -> dict[Part, list[tuple[str, str]]]:
    """Divide a topic's docstrings, keeping each module whole.

    Args:
        modules: Docstrings by module, of two modules or more.
        val_fraction: Share of the docstrings to hold out at most; of one module at least.

    Returns:
        For each part, pairs of a docstring and its module. Which modules are held out depends on their names alone.
    """
    allowed = val_fraction * sum(map(len, modules.values()))
    held_out = set()
    for module in sorted(modules, key=_digest):
        if len(modules[module]) <= allowed:
            allowed -= len(modules[module])
            held_out.add(module)
    held_out = held_out or {min(modules, key=lambda module: (len(modules[module]), module))}
    parts: dict[Part, list[tuple[str, str]]] = {"train": [], "validation": []}
    for module, texts in modules.items():
        parts["validation" if module in held_out else "train"] += ((text, module) for text in texts)
    return parts


@functools.cache  # the library does not change while a process runs, and parsing it takes seconds
def _read(root: Path) -> Docstrings:
    """Docstrings by topic and module, of the topics with enough modules; each text is there once."""
    files = {name: size for name, size in python_files(root).items() if _topic(name) not in ("", *_REMOVED)}
    modules = Counter(map(_topic, files))
    files = {name: size for name, size in files.items() if modules[_topic(name)] >= _LEAST_MODULES}
    found: dict[str, list[str]] = {}
    with progress_bar("Reading docstrings", sum(files.values())) as bar:
        for name, size in files.items():
            found[name] = _docstrings(root / name)
            bar.update(size)
    count = Counter(text for texts in found.values() for text in texts)
    topics: Docstrings = {}
    for name, texts in found.items():
        if unique := [text for text in texts if count[text] == 1]:
            topics.setdefault(_topic(name), {})[name] = unique
    return {topic: of_topic for topic, of_topic in topics.items() if len(of_topic) >= _LEAST_MODULES}


def _topic(name: str) -> str:
    """The top-level package of a file, nothing for a single module."""
    package, slash, _ = name.partition("/")
    return package if slash and package.isidentifier() else ""


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser's opinions about somebody else's escape sequences
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files are templates or of another Python
            return []
        except OSError as error:
            raise CorpusError(f"'{path}' cannot be read: {error.strerror}.") from error
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    # An escape can spell half a surrogate pair, which tokenizers do not take.
    return [text.encode(errors="replace").decode() for text in texts if text and len(text.split()) >= _LEAST_WORDS]


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), person=b"lowbit topics").digest()
