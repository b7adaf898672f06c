"""Documents to stream to windows: nothing lost, nothing twice."""

import numpy as np
import pytest
import torch

from lowbit_lightning.data.packing import (
    EncodedDocument,
    Prompts,
    Windows,
    compact_dtype,
    iterate_windows,
    pack,
    predicted_bytes,
)

TEXTS = [b"first", b"", b"the second document", b"3"]


def encoded(texts: list[bytes], counted: bool = False) -> list[EncodedDocument]:
    arrays = [np.frombuffer(text, dtype=np.uint8) for text in texts]
    return [EncodedDocument(array, np.arange(len(array), dtype=np.int32) if counted else None) for array in arrays]


def test_stream_opens_with_a_boundary_and_every_document_ends_with_one() -> None:
    assert pack(encoded(TEXTS), 0, 256).tokens.tobytes() == b"\0first\0the second document\x003\0"


@pytest.mark.parametrize("seq_len", [2, 3, 5, 8, 29])
def test_every_token_is_predicted_exactly_once(seq_len: int) -> None:
    stream = pack(encoded(TEXTS), 0, 256)
    windows = Windows(stream, seq_len)
    predicted = np.concatenate([windows[index]["input_ids"][1:].numpy() for index in range(len(windows))])
    assert predicted.tolist() == stream.tokens[1 : 1 + len(predicted)].tolist()
    assert len(stream.tokens) - 1 - len(predicted) < seq_len - 1


def test_a_window_starts_with_the_last_token_of_the_one_before() -> None:
    windows = Windows(pack(encoded(TEXTS), 0, 256), 5)
    assert all(windows[n]["input_ids"][-1] == windows[n + 1]["input_ids"][0] for n in range(len(windows) - 1))


def test_a_batch_equals_its_items() -> None:
    windows = Windows(pack(encoded(TEXTS, counted=True), 0, 256), 4)
    batch = windows.__getitems__([3, 0, 2])
    for row, index in enumerate([3, 0, 2]):
        assert all(torch.equal(batch[name][row], windows[index][name]) for name in batch)
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["num_bytes"].dtype == torch.int64


def test_labels_are_the_inputs_in_memory_of_their_own() -> None:
    batch = Windows(pack(encoded(TEXTS), 0, 256), 4).__getitems__([0, 1])
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


def test_an_index_beyond_the_end_is_an_error() -> None:
    windows = Windows(pack(encoded(TEXTS), 0, 256), 4)
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("seq_len", [2, 4, 9])
def test_lazy_windows_equal_windows_in_memory(seq_len: int, counted: bool) -> None:
    windows = Windows(pack(encoded(TEXTS, counted), 0, 256), seq_len)
    lazy = list(iterate_windows(encoded(TEXTS, counted), 0, 256, seq_len))
    assert len(lazy) == len(windows)
    for window, item in zip(lazy, (windows[index] for index in range(len(windows))), strict=True):
        assert window.tokens.tolist() == item["input_ids"].tolist()
        assert predicted_bytes(window) == item["num_bytes"]


def test_prompts_open_documents_and_have_one_length() -> None:
    prompts = Prompts(pack(encoded(TEXTS), 0, 256), boundary=0, length=6, count=2)
    assert [bytes(prompts[index]["input_ids"].tolist()) for index in range(len(prompts))] == [b"\0first", b"\0the s"]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_tokens_take_the_smallest_type_that_holds_them(vocab_size: int, dtype: str) -> None:
    assert compact_dtype(vocab_size) == dtype
