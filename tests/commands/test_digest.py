"""`doctor --digest`: every path of this machine agrees with the committed digests, and a difference is named."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import digest
from lowbit_lightning.kernels.block_float import BoxFormat, pack_reference, quantize_reference, unpack_reference
from lowbit_lightning.kernels.micro_adam import micro_adam_step_reference
from lowbit_lightning.kernels.micro_adam_tensor import MicroAdamTensor
from lowbit_lightning.kernels.rademacher_cpu import Pass
from lowbit_lightning.kernels.solo import solo_step_reference
from lowbit_lightning.kernels.solo_tensor import SoloTensor


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

    def faulty_micro_adam(tensors: Sequence[MicroAdamTensor]) -> list[bool]:
        skipped = [micro_adam_step_reference(tensor) for tensor in tensors]
        if tensors[0].state["step"] == digest.STEPS:
            tensors[0].state["values"][0, 0] += 1
        return skipped

    def faulty_rademacher(one: Pass) -> None:
        digest.rademacher_reference(one)
        if one.noise.step == digest.STEPS - 1 and one.noise.rank1 and one.source is not one.out:
            one.out[3, 5] *= -1

    def faulty_block_float(
        format: BoxFormat, shape: Any, noise: Any, *, x: Any = None, out: Any = None, packed: Any = None
    ) -> None:
        if x is None:
            out.copy_(unpack_reference(packed, format, out.shape, out.dtype))
        elif packed is None:
            out.copy_(quantize_reference(x, format, noise, 0))
        else:
            for mine, own in zip(packed, pack_reference(x, format, noise), strict=True):
                mine.copy_(own)
            packed.scales[3, 1] += format.kind == "affine"

    def paths() -> Iterator[digest.ComputePath]:
        yield digest.ComputePath("faulty", "cpu", faulty, faulty_micro_adam, faulty_rademacher, faulty_block_float)

    monkeypatch.setattr(digest, "paths", paths)
    monkeypatch.setattr(digest, "SOLO_BITS", ((4, 2),))
    assert digest.run() == 1
    text = capsys.readouterr().out
    assert "first in matrix.exp_avg_sq_codes" in text
    assert "first in matrix.values" in text
    assert text.count("first in perturbed") == 2, "rank-1 signs, fp32 and bf16"
    assert text.count("first in scales") == 4, "affine, of two widths, fp32 and bf16"
