"""`doctor --digest`: every path of this machine agrees with the committed digests, and a difference is named."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import digest
from lowbit_lightning.kernels.solo import SoloTensor, solo_step_reference


def test_this_machine_computes_the_committed_bits(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # Interpreting Triton takes half a minute; tests/kernels/test_solo_triton.py has its own comparison.
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["doctor", "--digest"]) == 0
    text = capsys.readouterr().out
    assert "reference, CPU" in text
    assert "DIFFERS" not in text


def test_one_wrong_bit_is_found_and_its_tensor_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def faulty(tensors: Sequence[SoloTensor]) -> list[bool]:
        skipped = [solo_step_reference(tensor) for tensor in tensors]
        if tensors[0].state["step"] == digest.STEPS and "exp_avg_sq_codes" in tensors[0].state:
            tensors[0].state["exp_avg_sq_codes"][3, 5] ^= 1
        return skipped

    def paths() -> Iterator[tuple[str, str, digest.Step]]:
        yield "faulty", "cpu", faulty

    monkeypatch.setattr(digest, "paths", paths)
    monkeypatch.setattr(digest, "SOLO_BITS", ((4, 2),))
    assert digest.run() == 1
    assert "first in matrix.exp_avg_sq_codes" in capsys.readouterr().out
