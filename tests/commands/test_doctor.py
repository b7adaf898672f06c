import sys
import types

import pytest

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import doctor


def test_report_has_every_section_and_the_self_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    # The one test that starts the self-test's process: it needs TRITON_INTERPRET before its first import of triton.
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for expected in (
        "Versions\n",
        "torch  ",
        "lightning  ",
        "pytorch-lightning",
        "torchmetrics",
        "jsonargparse",
        "triton  ",
        "transformers",
        "tensorboard",
        "CPU  ",
        "RAM  ",
        "CUDA  ",
        "MPS  ",
        "Triton self-test\n  passed",
        "C++ compiler\n",
        "GiB free",
        "What will and won't work here\n",
    ):
        assert expected in report
    assert "built on lightning.pytorch" in report


def test_a_broken_torch_does_not_end_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what `import torch` finds when it cannot be imported
    report = doctor.report()
    assert "FAILED: ModuleNotFoundError" in report
    assert "Disk" in report


def test_missing_compiler_is_named_with_its_consequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.compiler_found() == ""
    verdicts = doctor.verdicts("passed in the interpreter", "")
    assert any(line.startswith("NO   torch.compile") for line in verdicts)


def test_failed_self_test_on_cuda_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    verdicts = doctor.verdicts("FAILED: no driver", "g++")
    assert any(line.startswith("NO   Triton kernels on CUDA") for line in verdicts)
    assert any(line.startswith("NO   bf16") for line in verdicts)


def test_digest_is_handed_to_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = types.ModuleType("lowbit_lightning.commands.digest")
    digest.run = lambda: 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lowbit_lightning.commands.digest", digest)
    monkeypatch.setattr("lowbit_lightning.commands.digest", digest, raising=False)
    assert main(["doctor", "--digest"]) == 7
