"""Packing by the compiled path, by Triton and under torch.compile equals the reference bit for bit."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from lowbit_lightning.kernels import block_float, block_float_cpu
from lowbit_lightning.kernels.block_float import (
    DTYPES,
    BoxFormat,
    matrix_shape,
    pack,
    pack_reference,
    quantize,
    quantize_reference,
    unpack,
    unpack_reference,
)
from lowbit_lightning.kernels.block_float_triton import launch

NOISE = (2**33 + 1, 2**32 - 2, 3)
FORMATS = [
    BoxFormat(bits, box, "bfp") for bits, box in zip((2, 3, 4, 5, 6, 7, 8, 16), (16, 32, 64, 128) * 2, strict=True)
]
FORMATS += [BoxFormat(bits, 16, "affine") for bits in (2, 3, 4, 5, 6, 7, 8)]
FORMATS += [BoxFormat(bits, 16, kind, "nearest") for kind in ("bfp", "affine") for bits in (2, 4, 8)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def filled(shape: tuple[int, ...], dtype: torch.dtype, special: bool = True) -> Tensor:
    """Values of many magnitudes, with runs of zeros, the largest numbers, subnormals and some that are not finite."""
    limit = torch.finfo(dtype).max
    x = (torch.randn(shape) * torch.exp(8 * torch.randn(shape))).clamp(-limit, limit).to(dtype)
    flat = x.view(-1)
    if special and flat.numel() >= 200:
        middle = flat.numel() // 2
        flat[0], flat[3], flat[-1] = -limit, torch.nan, -torch.inf
        flat[middle : middle + 40] = 0
        flat[-60:-50], flat[-30:-20] = limit, -0.0
        flat[-100:-80] = torch.finfo(dtype).smallest_normal / 4
    return x


def noise_for(format: BoxFormat) -> tuple[int, int, int] | None:
    return NOISE if format.rounding == "stochastic" else None


def same(one: Tensor, other: Tensor) -> bool:
    """Whether every bit is, of NaN only that it is one."""
    bits = [tensor.nan_to_num(nan=0).flatten().clone().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(*bits)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_compiled_path_is_the_reference(format: BoxFormat) -> None:
    assert block_float_cpu.load_library() is not None
    noise = noise_for(format)
    shapes = [(), (5,), (3, 7, 100), (0, 4), (4, 0), (2, 64), (3, 2500), (40, 1024), (150, 20)]
    for shape, dtype in product(shapes, DTYPES):
        x = filled(shape, dtype)
        expected, packed = pack_reference(x, format, noise), pack(x, format, noise)
        assert torch.equal(packed.codes, expected.codes), (shape, dtype)
        assert same(packed.scales, expected.scales), (shape, dtype)
        values = unpack_reference(expected, format, shape, dtype)
        assert same(unpack(packed, format, shape, dtype), values), (shape, dtype)
        assert same(quantize(x, format, noise), values), (shape, dtype)


@pytest.mark.parametrize("format", [BoxFormat(3), BoxFormat(4, 128, "affine")], ids=str)
@pytest.mark.parametrize("shape", [(100_001,), (300, 1000), (50_000, 3)])
def test_threads_share_the_work_and_change_nothing(shape: tuple[int, ...], format: BoxFormat) -> None:
    x = filled(shape, torch.float32)
    alone, columns = pack(x, format, NOISE), quantize(x, format, NOISE, 0)
    torch.set_num_threads(2)  # not for the reference: torch's own threads wait for each other on a busy machine
    together = pack(x, format, NOISE)
    values, along = unpack(together, format, shape, x.dtype), quantize(x, format, NOISE, 0)
    torch.set_num_threads(1)
    assert torch.equal(together.codes, alone.codes)
    assert same(together.scales, alone.scales)
    assert same(values, unpack_reference(alone, format, shape, x.dtype))
    assert same(along, columns)


@pytest.mark.parametrize("format", FORMATS[::3], ids=str)
def test_the_compiled_path_quantizes_along_any_axis(format: BoxFormat) -> None:
    for shape, dtype in product([(300,), (150, 20), (2, 130, 3), (3, 5, 33)], DTYPES):
        x = filled(shape, dtype)
        for axis in range(-len(shape), len(shape)):
            expected = quantize_reference(x, format, noise_for(format), axis)
            assert same(quantize(x, format, noise_for(format), axis), expected), (shape, dtype, axis)


# numpy warns of infinite elements, whose codes are not used.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("format", "dtype"), [(format, DTYPES[i % 3]) for i, format in enumerate([*FORMATS[:11], *FORMATS[-2:]])], ids=str
)
def test_the_triton_kernel_is_the_reference(format: BoxFormat, dtype: torch.dtype) -> None:
    noise = noise_for(format)
    for shape in [(3, 100), (2, 128), (2, 70, 3)]:
        x = filled(shape, dtype).to(DEVICE)
        rows, columns = matrix_shape(shape)
        expected = pack_reference(x, format, noise)
        packed, out = type(expected)(*map(torch.zeros_like, expected)), torch.empty_like(x)
        launch(format, (rows, columns, 1), noise, x=x, packed=packed)
        assert torch.equal(packed.codes, expected.codes), shape
        assert same(packed.scales, expected.scales), shape
        values = unpack_reference(expected, format, shape, dtype)
        launch(format, (rows, columns, 1), None, out=out, packed=packed)
        assert same(out, values), shape
        launch(format, (rows, columns, 1), noise, x=x, out=out)
        assert same(out, values), shape
        if x.ndim > 1:
            launch(format, (x.numel() // shape[-2], shape[-2], shape[-1]), noise, x=x, out=out)
            assert same(out, quantize_reference(x, format, noise, -2)), shape


# For an H100, which need not be there.
_COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowbit_lightning.kernels.block_float_triton_kernels import block_float

PATHS = [(True, True), (False, True), (True, False)]
for (reads, packed), affine, bits, even in itertools.product(PATHS, (False, True), (3, 4, 8), (False, True)):
    strided = reads and not packed and even
    constants = dict(
        READS=reads, PACKED=packed, STOCHASTIC=reads, AFFINE=affine, BITS=bits, BOX=16, BOXES=64, DTYPE=bits // 4,
        STRIDED=strided, EVEN=even,
    )
    values, scales = ("*fp32", "*i16", "*fp16")[bits // 4], "*i16" if affine else "*u8"
    types = dict.fromkeys(block_float.arg_names, "i32") | dict(x=values, out=values, codes="*u8", scales=scales)
    types |= dict.fromkeys(constants, "constexpr")
    options = dict(num_warps=4, enable_fp_fusion=False)
    compiled = triton.compile(ASTSource(block_float, types, constants), GPUTarget("cuda", 90, 32), options)
    assert "st.global" in compiled.asm["ptx"]
print("compiled")
"""


@pytest.mark.long
def test_the_triton_kernel_compiles_where_the_interpreter_would_accept_more() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


def test_strides_do_not_matter() -> None:
    x, format = torch.randn(6, 40, 50), BoxFormat(4)
    for view in (x.transpose(0, 2), x[:, ::2], x[..., 3:], x.expand(2, 6, 40, 50)):
        assert torch.equal(pack(view, format, NOISE).codes, pack(view.clone(), format, NOISE).codes)
        assert torch.equal(quantize(view, format, NOISE, 0), quantize_reference(view, format, NOISE, 0))
    packed = pack(x, format, NOISE)
    strided = type(packed)(packed.codes.T.contiguous().T, packed.scales)
    assert torch.equal(unpack(strided, format, x.shape, x.dtype), unpack(packed, format, x.shape, x.dtype))


def test_noise_depends_on_seed_stream_and_step() -> None:
    x, format = torch.randn(8, 64), BoxFormat(4)
    codes = [pack(x, format, noise).codes for noise in ((1, 2, 3), (9, 2, 3), (1, 9, 3), (1, 2, 9), (1, 2, 3))]
    assert torch.equal(codes[0], codes[4])
    assert not any(torch.equal(codes[0], other) for other in codes[1:4])
    assert torch.equal(codes[0], pack(x, format, torch.tensor((1, 2, 3))).codes)


def test_operators_keep_the_rules_of_torch() -> None:
    x, noise = torch.randn(3, 50), torch.tensor(NOISE)
    for affine in (False, True):
        torch.library.opcheck(block_float._pack_operator, (x, 4, 16, affine, noise))
        torch.library.opcheck(block_float._quantize_operator, (x, 4, 16, affine, None, 0))
        packed = pack_reference(x, BoxFormat(4, 16, "affine" if affine else "bfp"), NOISE)
        arguments = (*packed, 4, 16, affine, [3, 50], torch.bfloat16)
        torch.library.opcheck(block_float._unpack_operator, arguments)


def test_a_new_step_compiles_nothing() -> None:
    format, counter = BoxFormat(4), torch._dynamo.testing.CompileCounter()

    def compute(x: Tensor, noise: Tensor) -> Tensor:
        doubled = unpack(pack(x * 2, format, noise), format, x.shape, x.dtype)
        return doubled + quantize(x, format, noise, axis=0)

    compiled = torch.compile(compute, backend=counter, fullgraph=True)
    x = torch.randn(3, 50)
    for step in range(4):
        noise = torch.tensor((1, 2, step))
        assert torch.equal(compiled(x, noise), compute(x, noise))
    assert counter.frame_count == 1


@pytest.mark.parametrize("function", [pack, quantize])
def test_noise_is_asked_for_exactly_where_it_is_used(function: object) -> None:
    assert callable(function)
    x = torch.randn(4, 16)
    with pytest.raises(ValueError, match=r"noise=None is out of range for stochastic rounding: give \(seed"):
        function(x, BoxFormat(4))
    with pytest.raises(ValueError, match=r"noise=\(1, 2, 3\) has no use when rounding to nearest"):
        function(x, BoxFormat(4, rounding="nearest"), (1, 2, 3))
    with pytest.raises(
        TypeError, match=r"cannot quantize a tensor of torch\.float64: it must be one of torch\.float32"
    ):
        function(x.double(), BoxFormat(4), (1, 2, 3))


def test_what_would_be_read_beyond_its_end_is_refused() -> None:
    x, format = torch.randn(4, 32), BoxFormat(4)
    packed = pack(x, format, NOISE)
    for other, shape in ((format, (4, 48)), (format, (5, 32)), (BoxFormat(8), (4, 32)), (BoxFormat(4, 32), (4, 32))):
        with pytest.raises(ValueError, match=r"are not what a tensor of shape .* becomes with BoxFormat"):
            unpack(packed, other, shape, x.dtype)
    with pytest.raises(ValueError, match=r"and torch\.bfloat16"):
        unpack(packed, BoxFormat(4, 16, "affine"), x.shape, x.dtype)
    with pytest.raises(IndexError, match=r"axis=2 is out of range: a tensor of shape \(4, 32\) has no such axis"):
        quantize(x, format, NOISE, axis=2)
