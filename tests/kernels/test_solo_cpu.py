"""The compiled CPU step equals the reference bit for bit, whatever the shape, bits, data and number of threads."""

import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels import solo_cpu
from lowbit_lightning.kernels.dynamic import dynamic_map, dynamic_midpoints, encode_dynamic
from lowbit_lightning.kernels.elementary import LARGEST_SQUARABLE
from lowbit_lightning.kernels.solo import dequantize_moments, quantize_moments, solo_step, solo_step_reference
from lowbit_lightning.kernels.solo_tensor import SoloHyperparameters, SoloTensor, row_bytes

BITS = (2, 3, 4, 8, 32)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> SoloTensor:
    defaults: dict[str, Any] = {
        "lr": 1e-2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1,
        "bits": (4, 2), "block_size": 128, "quantile": 0.1, "seed": 3,
    }  # fmt: skip
    hyper = SoloHyperparameters(**(defaults | settings))
    blocks = -(-columns // hyper.block_size)
    state = {"step": torch.zeros(())}
    for key, bits in zip(("exp_avg", "exp_avg_sq"), hyper.bits, strict=True):
        if bits == 32:
            state[key] = torch.zeros(rows, columns)
            continue
        state[f"{key}_codes"] = torch.zeros(rows, row_bytes(columns, hyper.block_size, bits), dtype=torch.uint8)
        state[f"{key}_scale"] = torch.zeros(rows, blocks, dtype=scale_dtype)
    if hyper.bits[1] != 32:
        state["exp_avg_sq_log2_base"] = torch.zeros(rows, blocks, dtype=scale_dtype)
    param = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return SoloTensor(param, torch.empty(0), state, hyper, rows, columns, state_stream=5, weight_stream=2**32 - 7)


def twin(tensor: SoloTensor) -> SoloTensor:
    state = {key: value.clone() for key, value in tensor.state.items()}
    layout = tensor.rows, tensor.columns, tensor.state_stream, tensor.weight_stream, tensor.first_row
    return SoloTensor(tensor.param.clone(), tensor.grad, state, tensor.hyper, *layout)


def step_compiled(*tensors: SoloTensor) -> list[bool]:
    library = solo_cpu.load_library()
    assert library is not None
    assert all(solo_cpu.takes(tensor) for tensor in tensors)
    return solo_cpu.step_compiled(library, tensors)


def assert_equal(left: SoloTensor, right: SoloTensor) -> None:
    for key, value in left.state.items():
        assert torch.equal(value, right.state[key]), key
    assert torch.equal(left.param, right.param)


def assert_same_steps(tensor: SoloTensor, grads: list[Tensor]) -> None:
    other = twin(tensor)
    for grad in grads:
        tensor.grad = other.grad = grad.to(tensor.param.dtype)
        assert solo_step_reference(tensor) is False
        assert step_compiled(other) == [False]
        assert_equal(tensor, other)


def normal_grads(rows: int, columns: int, steps: int = 4, scale: float = 1e-3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(rows, columns, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", list(itertools.product(BITS, BITS)))
def test_equals_the_reference_at_all_bits(bits: tuple[int, int], dtype: torch.dtype) -> None:
    for columns, block_size in ((128, 128), (133, 64)):
        assert_same_steps(make(5, columns, dtype, bits=bits, block_size=block_size), normal_grads(5, columns))


@pytest.mark.parametrize("bits", [(4, 2), (3, 3), (8, 8)])
@pytest.mark.parametrize("block_size", [8, 64, 128, 256])
@pytest.mark.parametrize("columns", [5, 64, 128, 200, 133, 1000])
def test_equals_the_reference_at_all_widths(columns: int, block_size: int, bits: tuple[int, int]) -> None:
    tensor = make(3, columns, torch.bfloat16, bits=bits, block_size=block_size)
    assert_same_steps(tensor, normal_grads(3, columns))


@pytest.mark.parametrize(
    "settings",
    [
        {"quantile": 0.0}, {"quantile": 0.5}, {"quantile": 0.99}, {"stochastic_rounding": False}, {"maximize": True},
        {"bf16_stochastic_rounding": False}, {"beta1": 0.0, "beta2": 0.0}, {"seed": 2**40 + 1}, {"lr": 0.0},
    ],
)  # fmt: skip
def test_equals_the_reference_with_every_setting(settings: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_steps(make(4, 200, dtype, **settings), normal_grads(4, 200))


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("bits", [(4, 2), (3, 3), (8, 8), (2, 4), (32, 2), (4, 32)])
def test_equals_the_reference_with_bf16_scales(bits: tuple[int, int], stochastic: bool) -> None:
    for columns, block_size in ((5, 8), (128, 128), (133, 64), (200, 256)):
        for dtype in (torch.float32, torch.bfloat16):
            settings = {"bits": bits, "block_size": block_size, "stochastic_rounding": stochastic}
            tensor = make(7, columns, dtype, torch.bfloat16, **settings)
            assert_same_steps(tensor, normal_grads(7, columns))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e-22, 1e-19, 1e-12, 1.0, LARGEST_SQUARABLE / 8])
def test_equals_the_reference_with_bf16_scales_at_all_magnitudes(scale: float) -> None:
    for betas in ({}, {"beta1": 0.0, "beta2": 0.0}):
        tensor = make(8, 256, scale_dtype=torch.bfloat16, **betas)
        sparse = torch.rand(8, 256, generator=torch.Generator().manual_seed(2)) > 0.31
        grads = [grad.clamp(-8, 8) * sparse for grad in normal_grads(8, 256, scale=1.0)]
        assert_same_steps(tensor, [grad * scale for grad in grads] + [torch.full((8, 256), scale)])
        assert all(value.isfinite().all() for value in tensor.state.values())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1.0, 1e15])
def test_equals_the_reference_at_all_magnitudes(scale: float) -> None:
    assert_same_steps(make(4, 256, bits=(8, 8)), normal_grads(4, 256, scale=scale))
    assert_same_steps(make(4, 256), normal_grads(4, 256, scale=scale))


@pytest.mark.parametrize("bits", [(4, 2), (2, 3), (8, 8)])
def test_equals_the_reference_on_degenerate_blocks(bits: tuple[int, int]) -> None:
    normal = normal_grads(8, 256)
    sparse = [grad * (torch.rand(8, 256, generator=torch.Generator().manual_seed(2)) > 0.31) for grad in normal]
    single = [torch.zeros(8, 256).index_fill_(1, torch.tensor([7]), 1.0) for _ in normal]
    for grads in ([torch.zeros(8, 256)] * 3, [torch.full((8, 256), 1e-4)] * 3, sparse, single):
        assert_same_steps(make(8, 256, bits=bits), grads)


def test_all_midpoints_and_their_neighbours_get_the_reference_code() -> None:
    for bits in (2, 3, 4, 8):
        points = torch.tensor([*dynamic_midpoints(bits), *dynamic_map(bits), 1.0])
        values = torch.cat([points, points.nextafter(torch.tensor(2.0)), points.nextafter(torch.tensor(-2.0))])
        values = values.clamp(-1, 1)[None]
        codes, _ = encode_dynamic(values, bits)
        # beta1 = 0 makes the gradient the first moment; one block, 1 is its largest magnitude.
        columns = values.shape[1]
        tensor = make(1, columns, bits=(bits, 32), beta1=0.0, block_size=-(-columns // 8) * 8)
        tensor.grad = values
        step_compiled(tensor)
        decoded, _ = dequantize_moments(tensor.state, 1, columns, tensor.hyper.bits, tensor.hyper.block_size)
        assert torch.equal(decoded, torch.tensor(dynamic_map(bits))[codes.int()])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "columns"), [(1, 300_000), (3000, 133), (700, 256)])
def test_does_not_depend_on_the_number_of_threads(rows: int, columns: int) -> None:
    tensor = make(rows, columns, torch.bfloat16)
    other = twin(tensor)
    for grad in normal_grads(rows, columns, 2):
        tensor.grad = other.grad = grad.bfloat16()
        torch.set_num_threads(1)
        step_compiled(tensor)
        torch.set_num_threads(2)
        step_compiled(other)
    assert_equal(tensor, other)


@pytest.mark.usefixtures("two_threads")
def test_a_long_row_equals_the_reference() -> None:
    assert_same_steps(make(1, 200_003), normal_grads(1, 200_003, 2))


def test_a_forked_child_steps_like_its_parent() -> None:
    tensor = make(2000, 128)
    tensor.grad = normal_grads(2000, 128, 1)[0]
    torch.set_num_threads(2)
    step_compiled(tensor)  # the parent has threads now
    other = twin(tensor)
    for value in (other.param, *other.state.values()):
        value.share_memory_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
        child = os.fork()
    if child == 0:
        step_compiled(other)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    step_compiled(tensor)
    assert_equal(tensor, other)


def test_shards_draw_the_noise_of_their_global_rows() -> None:
    whole = make(8, 200, torch.bfloat16)
    shard = twin(whole)
    shard.param, shard.rows, shard.first_row = whole.param[5:].clone(), 3, 5
    shard.state = {key: value[5:].clone() if value.ndim else value.clone() for key, value in whole.state.items()}
    for grad in normal_grads(8, 200):
        whole.grad, shard.grad = grad.bfloat16(), grad[5:].bfloat16()
        step_compiled(whole)
        step_compiled(shard)
    assert torch.equal(whole.param[5:], shard.param)


def test_memory_format_does_not_matter() -> None:
    plain, strided = make(16, 128), make(16, 128)
    strided.param = strided.param.t().contiguous().t()
    for grad in normal_grads(16, 128):
        plain.grad, strided.grad = grad, grad.t().contiguous().t()
        step_compiled(plain, strided)
    assert_equal(plain, strided)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20])
@pytest.mark.parametrize("rows", [10, 1500])
def test_only_the_tensor_with_a_bad_gradient_is_skipped(rows: int, value: float) -> None:
    tensors = [make(rows, 128, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor.param)
    for bad in tensors[:2]:
        bad.grad[-1, -1] = value
    before = [twin(tensor) for tensor in tensors]
    assert step_compiled(*tensors) == [True, True, False]
    assert_equal(tensors[0], before[0])
    assert_equal(tensors[1], before[1])
    assert tensors[2].state["step"] == 1
    assert not torch.equal(tensors[2].param, before[2].param)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_gradient_is_the_references(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    limit = torch.tensor(LARGEST_SQUARABLE, dtype=torch.float32)
    values = torch.stack([limit.nextafter(torch.tensor(0.0)), limit, limit.nextafter(torch.tensor(torch.inf))]).to(
        dtype
    )
    for value in values:
        tensor = make(1, 64, dtype, scale_dtype, beta2=0.0)
        tensor.grad = torch.zeros(1, 64, dtype=dtype)
        tensor.grad[0, 3] = value
        other = twin(tensor)
        assert step_compiled(other) == [solo_step_reference(tensor)]
        assert_equal(tensor, other)
        assert all(state.isfinite().all() for state in other.state.values())


def test_a_half_precision_tensor_is_stepped_beside_others() -> None:
    tensors = [make(4, 128), make(4, 128, torch.float16), make(4, 128, torch.bfloat16)]
    expected = [twin(tensor) for tensor in tensors]
    for tensor, other in zip(tensors, expected, strict=True):
        tensor.grad = other.grad = torch.ones_like(tensor.param)
    assert solo_step(tensors) == [solo_step_reference(tensor) for tensor in expected] == [False] * 3
    for tensor, other in zip(tensors, expected, strict=True):
        assert_equal(tensor, other)


def test_continues_a_converted_state() -> None:
    tensor = make(4, 200, bits=(8, 4))
    moments = normal_grads(4, 200, 2)
    quantize_moments(moments[0], moments[1].square(), tensor.state, (8, 4), 128, 0.1)
    assert_same_steps(tensor, normal_grads(4, 200))


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    solo_cpu.load_library.cache_clear()
    yield monkeypatch
    solo_cpu.load_library.cache_clear()


def test_without_a_compiler_the_reference_steps_and_one_warning_names_the_remedy(
    fresh_choice: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh_choice.setenv("LOWBIT_LIGHTNING_CACHE", str(tmp_path))
    fresh_choice.setenv("CXX", "no-such-compiler")
    tensor = make(4, 128)
    tensor.grad = torch.ones(4, 128)
    expected = twin(tensor)
    solo_step_reference(expected)
    with pytest.warns(RuntimeWarning, match=r"no-such-compiler.*install g\+\+ or clang\+\+"):
        solo_step([tensor])
    assert_equal(tensor, expected)
    solo_step([tensor])  # a second warning would be an error here


def test_a_compiler_that_fails_is_named_with_what_it_says(fresh_choice: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho it hurts >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh_choice.setenv("LOWBIT_LIGHTNING_CACHE", str(tmp_path))
    fresh_choice.setenv("CXX", str(compiler))
    with pytest.warns(RuntimeWarning, match="it hurts"):
        assert solo_cpu.load_library() is None


def test_the_reference_can_be_asked_for(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setenv("LOWBIT_LIGHTNING_CPU_KERNEL", "reference")
    assert solo_cpu.load_library() is None


def test_a_choice_that_means_nothing_is_refused(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setenv("LOWBIT_LIGHTNING_CPU_KERNEL", "fast")
    with pytest.raises(ValueError, match="auto or reference"):
        solo_cpu.load_library()


def test_the_library_is_built_once(tmp_path: Path) -> None:
    first = solo_cpu.build_library(tmp_path)
    built = first.stat().st_mtime_ns
    assert solo_cpu.build_library(tmp_path) == first
    assert first.stat().st_mtime_ns == built
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
