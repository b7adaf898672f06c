"""The corpus that is always there."""

import os
from pathlib import Path

import pytest

from lowbit_lightning.data import PythonSource
from lowbit_lightning.data.python_source import python_files
from lowbit_lightning.errors import CorpusError, InvalidArgumentError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = [f"package/module_{n}.py" for n in range(60)]
    left_out = ["test/test_a.py", "package/tests/b.py", "package/idle_test/c.py", "site-packages/d.py", "package/e.txt"]
    for name in [*names, *left_out, "unittest/case.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{name}"""\n' + f"value = {len(name)}\n" * 20)
    (tmp_path / "package" / "__init__.py").write_text("")
    return tmp_path


def held_out(module: PythonSource) -> set[str]:
    module.setup("fit")
    text = bytes(token for batch in module.val_dataloader() for row in batch["input_ids"] for token in row[1:].tolist())
    return {document.split(b'"""')[1].decode() for document in text.split(b"\0") if document}


def test_standard_library_is_large_enough_and_offline() -> None:
    module = PythonSource(max_bytes=100_000)
    files = python_files(module.root)
    assert sum(files.values()) >= 8_000_000
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= files.keys()
    assert not any("site-packages" in name or "/test/" in f"/{name}" for name in files)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape == (16, 256)
    assert batch["num_bytes"].tolist() == [255] * 16


def test_tests_and_installed_packages_are_left_out(root: Path) -> None:
    assert set(python_files(root)) == {*(f"package/module_{n}.py" for n in range(60)), "unittest/case.py"}


def test_order_does_not_depend_on_the_file_system(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(python_files(root))
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder: str) -> None:
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert list(python_files(root)) == before


def test_split_depends_on_names_alone(root: Path) -> None:
    before = held_out(PythonSource(root=str(root), seq_len=2, val_fraction=0.2))
    for path in root.rglob("*.py"):
        path.write_text(path.read_text() + "# changed\n")
    (root / "package" / "another.py").write_text('"""package/another.py"""')
    after = held_out(PythonSource(root=str(root), seq_len=2, val_fraction=0.2, seed=7))
    assert before == after - {"package/another.py"}
    assert 3 < len(before) < 25


def test_max_bytes_takes_whole_files_of_both_parts(root: Path) -> None:
    module = PythonSource(root=str(root), seq_len=2, val_fraction=0.2, max_bytes=6000)
    assert held_out(module) <= held_out(PythonSource(root=str(root), seq_len=2, val_fraction=0.2))
    predictions = sum(len(module.dataset(part)) for part in ("train", "validation"))
    assert 4000 < predictions < 6000 + 61


def test_a_folder_without_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=f"no .py files in '{tmp_path}'"):
        PythonSource(root=str(tmp_path)).setup("fit")
    with pytest.raises(CorpusError, match="nowhere' cannot be read"):
        PythonSource(root=str(tmp_path / "nowhere")).setup("fit")


def test_a_budget_too_small_for_any_file_is_an_error(root: Path) -> None:
    with pytest.raises(CorpusError, match="max_bytes=10"):
        PythonSource(root=str(root), max_bytes=10).setup("fit")
    with pytest.raises(InvalidArgumentError, match="max_bytes=0"):
        PythonSource(max_bytes=0)
