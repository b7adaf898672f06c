"""What keeps one test from another: every test starts seeded, in an empty folder of its own, and undoes its globals."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist

# Tensors here are small: a second thread gains little, and on a machine that is busy otherwise the first one waits for
# it many times longer than it computes. A test of threading sets its own number.
torch.set_num_threads(1)

# Without a GPU, Triton's kernels run in its interpreter, which must be asked for before triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _globals_restored() -> Iterator[None]:
    """Lightning writes environment variables (its seed), precision plugins the default dtype."""
    environment, dtype, threads = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ |= environment
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _empty_working_folder(_globals_restored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer without a root directory writes ``lightning_logs`` and ``checkpoints`` where it stands.

    After the fixture above, so that what a test patched (``sys.modules`` even) is back before globals are restored.
    """
    monkeypatch.chdir(tmp_path)
