"""Bytes and tokenizers: round trips, exact byte counts, and what cannot be a vocabulary."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lowbit_lightning.data.packing import Windows, pack
from lowbit_lightning.data.tokens import ByteTokens, PretrainedTokens, bytes_per_token
from lowbit_lightning.errors import InvalidArgumentError


def test_byte_tokens_are_the_bytes(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    assert [document.tokens.tobytes() for document in ByteTokens().encode(encoded)] == encoded


def test_nul_bytes_are_removed_with_one_warning() -> None:
    tokens = ByteTokens()
    with pytest.warns(UserWarning, match="NUL bytes were removed") as caught:
        documents = list(tokens.encode([b"a\0b", b"\0\0c"]))
    assert [document.tokens.tobytes() for document in documents] == [b"ab", b"c"]
    assert len(caught) == 1


def test_byte_decoding_leaves_out_boundaries_and_padded_vocabulary() -> None:
    assert ByteTokens().decode([0, *"é".encode(), 0, 300, 65]) == "éA"


def test_tokenizer_round_trip(tokenizer_path: str, texts: list[str]) -> None:
    tokens = PretrainedTokens(tokenizer_path)
    for text, document in zip(texts, tokens.encode(text.encode() for text in texts), strict=True):
        assert tokens.decode([*document.tokens.tolist(), tokens.boundary]) == text


def test_bytes_of_the_tokens_add_up_to_the_document(tokenizer_path: str, texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    for text, document in zip(encoded, PretrainedTokens(tokenizer_path).encode(encoded), strict=True):
        assert document.num_bytes is not None
        assert document.num_bytes.sum() == len(text)
        assert document.num_bytes.min() >= 0


def test_bytes_of_each_token_are_its_own_text(tokenizer_path: str) -> None:
    tokens = PretrainedTokens(tokenizer_path)
    (document,) = tokens.encode([b"the words again"])
    assert document.num_bytes is not None
    assert [len(tokens.decode([token])) for token in document.tokens.tolist()] == document.num_bytes.tolist()


def test_bytes_of_the_windows_are_exact(tokenizer_path: str, texts: list[str]) -> None:
    tokens = PretrainedTokens(tokenizer_path)
    encoded = [text.encode() for text in texts]
    stream = pack(tokens.encode(encoded), tokens.boundary, tokens.vocab_size)
    windows = Windows(stream, 2)
    counted = sum(int(windows[index]["num_bytes"]) for index in range(len(windows)))
    assert counted == sum(map(len, encoded)) + len(encoded)


def test_a_split_character_counts_once_and_trimmed_text_counts() -> None:
    assert bytes_per_token("ab", [(0, 2), (0, 0), (0, 0), (1, 2)]).tolist() == [2, 0, 0, 0]
    # "é" in two tokens, a space nobody covers, "数", and a trailing space nobody covers
    assert bytes_per_token("é 数 ", [(0, 1), (0, 1), (2, 3)]).tolist() == [2, 0, 5]


def test_bytes_that_are_not_utf8_become_replacement_characters(tokenizer_path: str) -> None:
    tokens = PretrainedTokens(tokenizer_path)
    (document,) = tokens.encode([b"caf\xe9"])
    assert tokens.decode(document.tokens.tolist()) == "caf\ufffd"
    assert document.num_bytes is not None
    assert document.num_bytes.sum() == len("caf\ufffd".encode())


def test_a_document_cannot_forge_a_boundary(tokenizer_path: str) -> None:
    tokens = PretrainedTokens(tokenizer_path)
    (document,) = tokens.encode([b"one<end>two"])
    assert tokens.boundary not in document.tokens


def test_a_tokenizer_without_offsets_still_counts_every_byte(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokens = PretrainedTokens(str(tmp_path))
    (document,) = tokens.encode(["naïve 数据".encode()])
    assert document.num_bytes is not None
    assert document.num_bytes.tolist() == np.ones(len("naïve 数据".encode())).tolist()


def word_level(folder: Path, **special_tokens: str) -> str:
    words = Tokenizer(models.WordLevel({"<s>": 0, "[SEP]": 1, "[UNK]": 2, "word": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special_tokens).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("special_tokens", "boundary"), [({"sep_token": "[SEP]", "bos_token": "<s>"}, 1), ({"bos_token": "<s>"}, 0)]
)
def test_separator_or_start_token_stands_in_for_the_end(
    tmp_path: Path, special_tokens: dict[str, str], boundary: int
) -> None:
    assert PretrainedTokens(word_level(tmp_path, **special_tokens)).boundary == boundary


def test_a_tokenizer_without_any_boundary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no eos, sep or bos token"):
        PretrainedTokens(word_level(tmp_path))


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=f"tokenizer='{tmp_path}' cannot be loaded"):
        PretrainedTokens(str(tmp_path))
