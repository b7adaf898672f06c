"""A small real tokenizer and a small corpus with characters of one to four bytes, both made on the spot."""

from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

DOCUMENTS = [
    "plain words, plain words, and the words again\n",
    "naïve café – déjà vu, naïve café – déjà vu",
    "数据很小,但是真实的数据",
    "🙂🙃 two faces, then text 🙂🙃",
    "  spaces before, and spaces behind  \n\n",
    "x",
]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE whose vocabulary is so small that it splits characters."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(DOCUMENTS[:2], vocab_size=280, special_tokens=["<end>"], show_progress=False)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with 120 different documents in files a.txt, b.txt and lines.jsonl."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(" ".join(DOCUMENTS))
    (folder / "b.txt").write_text(" ".join(reversed(DOCUMENTS)))
    lines = (f'{{"id": {n}, "text": "{n} {DOCUMENTS[1 + n % 3]}"}}\n' for n in range(118))
    (folder / "lines.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents with characters of one to four bytes, and with spaces at their edges."""
    return DOCUMENTS
