"""Streams against what is in memory: the same documents, in a bounded buffer, shared exactly between processes."""

import pickle
import random
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lowbit_lightning.data import TextFiles
from lowbit_lightning.data.files import find_files, read_documents
from lowbit_lightning.data.streaming import StreamedWindows, shuffled
from lowbit_lightning.data.tokens import ByteTokens


def everything(document: bytes) -> bool:
    return True


def streamed(corpus: Path, seq_len: int = 2, **options: Any) -> StreamedWindows:
    return StreamedWindows(find_files([f"{corpus}/*"], "train"), "text", ByteTokens(), seq_len, everything, **options)


def documents_of(windows: StreamedWindows) -> Counter[bytes]:
    tokens = bytes(int(item["input_ids"][1]) for item in windows)
    return Counter(document for document in tokens.split(b"\0") if document)


@pytest.fixture
def in_memory(corpus: Path) -> Counter[bytes]:
    return Counter(d for path in sorted(corpus.iterdir()) for d in read_documents(str(path), "text"))


@pytest.mark.parametrize("shuffle", [False, True])
def test_stream_holds_the_documents_that_are_in_memory(corpus: Path, in_memory: Counter[bytes], shuffle: bool) -> None:
    assert documents_of(streamed(corpus, shuffle=shuffle, buffer_bytes=500)) == in_memory


def test_workers_divide_the_documents(corpus: Path, in_memory: Counter[bytes]) -> None:
    windows = streamed(corpus, shuffle=True, buffer_bytes=500)
    shares = [Counter(windows.documents(worker, 2)) for worker in range(2)]
    assert shares[0] + shares[1] == in_memory
    assert not shares[0] & shares[1]


def test_ranks_divide_the_windows_equally(corpus: Path) -> None:
    options = {"seq_len": 16, "shuffle": True, "seed": 3, "buffer_bytes": 500}
    whole = [item["input_ids"].tolist() for item in streamed(corpus, **options)]
    world_size = next(size for size in range(2, 9) if len(whole) % size)
    shares = [
        [item["input_ids"].tolist() for item in streamed(corpus, rank=rank, world_size=world_size, **options)]
        for rank in range(world_size)
    ]
    rounds = len(whole) // world_size
    assert [len(share) for share in shares] == [rounds] * world_size
    assert [row for rows in zip(*shares, strict=True) for row in rows] == whole[: rounds * world_size]


def test_order_is_a_function_of_seed_and_epoch(corpus: Path) -> None:
    def order(seed: int, epoch: int) -> list[bytes]:
        windows = streamed(corpus, shuffle=True, seed=seed, buffer_bytes=500)
        windows.set_epoch(epoch)
        return list(windows.documents())

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_shuffling_holds_no_more_than_its_buffer() -> None:
    largest = 0
    taken = 0

    def source() -> Any:
        nonlocal taken
        for _ in range(1000):
            taken += 10
            yield b"0123456789"

    given = 0
    for document in shuffled(source(), 100, random.Random(0)):
        given += len(document)
        largest = max(largest, taken - given)
    assert given == taken == 10_000
    assert largest <= 100


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    path = tmp_path / "corpus" / "large.txt"
    path.parent.mkdir()
    path.write_bytes(b"a line of text that is repeated\n" * 500_000)
    windows = streamed(path.parent, seq_len=4096, shuffle=True, buffer_bytes=2**20)
    tracemalloc.start()
    count = sum(1 for _ in windows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count * 4095 > 0.99 * path.stat().st_size
    assert peak < path.stat().st_size / 2


def test_a_large_text_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("naïve line\n" * 100)
    parts = list(read_documents(str(path), "text", max_text_bytes=64))
    assert b"".join(parts) == path.read_bytes()
    assert all(part.endswith(b"\n") and len(part) < 128 for part in parts)
    assert len(parts) > 10


def test_stream_survives_the_way_to_a_worker(corpus: Path, tokenizer_path: str) -> None:
    module = TextFiles(train=[f"{corpus}/*"], val_fraction=0.2, streaming=True, tokenizer=tokenizer_path, seq_len=16)
    module.setup("fit")
    dataset = module.dataset("train")
    copy = pickle.loads(pickle.dumps(dataset))
    assert next(iter(copy))["input_ids"].tolist() == next(iter(dataset))["input_ids"].tolist()


def test_split_and_byte_counts_equal_those_in_memory(corpus: Path, tokenizer_path: str) -> None:
    make = partial(TextFiles, [f"{corpus}/*"], val_fraction=0.2, seq_len=2, tokenizer=tokenizer_path)
    batches = []
    for streaming in (False, True):
        module = make(streaming=streaming)
        module.setup("fit")
        rows = [
            (tuple(window), int(num_bytes))
            for batch in module.val_dataloader()
            for window, num_bytes in zip(batch["input_ids"].tolist(), batch["num_bytes"], strict=True)
        ]
        batches.append((rows, [row["input_ids"].tolist() for row in module.predict_dataloader()]))
    assert batches[0] == batches[1]


# Python 3.12 warns of every fork in a process with threads, and torch always has some.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_worker_processes_read_the_corpus_once(corpus: Path, in_memory: Counter[bytes]) -> None:
    module = TextFiles([f"{corpus}/*.jsonl"], [f"{corpus}/*.txt"], streaming=True, seq_len=2, num_workers=2)
    module.setup("fit")
    tokens = Counter(row[1] for batch in module.train_dataloader() for row in batch["input_ids"].tolist())
    lines = {document: count for document, count in in_memory.items() if document[:1].isdigit()}
    expected = Counter(token for document, count in lines.items() for token in [*document, 0] for _ in range(count))
    assert tokens == expected
