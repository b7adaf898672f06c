"""The Triton step is the reference bit for bit: on CUDA where there is one, else in Triton's interpreter."""

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels import solo_triton
from lowbit_lightning.kernels.dynamic import encode_dynamic
from lowbit_lightning.kernels.elementary import LARGEST_SQUARABLE
from lowbit_lightning.kernels.solo import solo_step, solo_step_reference
from lowbit_lightning.kernels.solo_tensor import SoloHyperparameters, SoloTensor, row_bytes
from lowbit_lightning.kernels.solo_triton import step_triton

KERNELS = "lowbit_lightning.kernels.solo_triton_kernels"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter takes as long for a tile of any size; a GPU is tested with the tiles it is used with.
    if DEVICE.type == "cpu":
        monkeypatch.setattr(solo_triton, "_WARP_CALLS", 1024)


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solo_triton, "_plans", type(solo_triton._plans)())


def hyperparameters(bits: tuple[int, int], block_size: int = 128, **changes: object) -> SoloHyperparameters:
    settings = {
        "lr": 1e-2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "quantile": 0.1, "seed": 7,
    }  # fmt: skip
    return SoloHyperparameters(**(settings | changes), bits=bits, block_size=block_size)  # type: ignore[arg-type]


def new_tensor(
    rows: int,
    columns: int,
    hyper: SoloHyperparameters,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    number: int = 0,
    scale_dtype: torch.dtype = torch.float32,
) -> SoloTensor:
    """Return a tensor with a zero state and no gradient yet, on the CPU."""
    state = {"step": torch.zeros(())}
    for key, bits in zip(("exp_avg", "exp_avg_sq"), hyper.bits, strict=True):
        if bits == 32:
            state[key] = torch.zeros(rows, columns)
            continue
        blocks = -(-columns // hyper.block_size)
        state[f"{key}_codes"] = torch.zeros(rows, row_bytes(columns, hyper.block_size, bits), dtype=torch.uint8)
        state[f"{key}_scale"] = torch.zeros(rows, blocks, dtype=scale_dtype)
    if hyper.bits[1] != 32:
        state["exp_avg_sq_log2_base"] = torch.zeros_like(state["exp_avg_sq_scale"])
    generator = torch.Generator().manual_seed(number)
    param = torch.randn(rows, columns, generator=generator).to(dtypes[0])
    grad = torch.zeros(rows, columns, dtype=dtypes[1])
    return SoloTensor(param, grad, state, hyper, rows, columns, 11 + number, 22 + number, 3 * number)


def on_device(tensor: SoloTensor) -> SoloTensor:
    """Return a copy on the tested device, with a counter of skipped steps."""
    state = {key: value.to(DEVICE, copy=True) for key, value in tensor.state.items()}
    skips = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return SoloTensor(
        tensor.param.to(DEVICE, copy=True), tensor.grad.to(DEVICE, copy=True), state, tensor.hyper, tensor.rows,
        tensor.columns, tensor.state_stream, tensor.weight_stream, tensor.first_row, skips,
    )  # fmt: skip


def gradient(tensor: SoloTensor, step: int, number: int = 0) -> Tensor:
    """Return values of many magnitudes, a zero row, a constant row, and one with many zeros."""
    generator = torch.Generator().manual_seed(1000 * number + step)
    values = torch.randn(tensor.rows, tensor.columns, generator=generator)
    values *= torch.exp(2 * torch.randn(tensor.rows, tensor.columns, generator=generator))
    if tensor.rows > 4:
        values[1] = 0
        values[2] = 0.25
        values[3, torch.rand(tensor.columns, generator=generator) < 0.6] = 0
    return values.to(tensor.grad.dtype)


def compare(tensors: Sequence[SoloTensor], steps: int = 3) -> tuple[list[SoloTensor], list[SoloTensor]]:
    """Make the same steps both ways and assert equal bits after each."""
    ours = [on_device(tensor) for tensor in tensors]
    for step in range(steps):
        for number, (expected, got) in enumerate(zip(tensors, ours, strict=True)):
            expected.grad.copy_(gradient(expected, step, number))
            got.grad.copy_(expected.grad)
        assert step_triton(ours) == [solo_step_reference(tensor) for tensor in tensors]
        for expected, got in zip(tensors, ours, strict=True):
            assert_equal(expected, got)
    return list(tensors), ours


def assert_equal(expected: SoloTensor, got: SoloTensor) -> None:
    for key, value in {"param": expected.param, **expected.state}.items():
        other = (got.param if key == "param" else got.state[key]).cpu()
        integers = torch.int32 if value.dtype == torch.float32 else torch.int16
        same = value == other if value.dtype == torch.uint8 else value.view(integers) == other.view(integers)
        assert same.all(), f"{key} of {tuple(value.shape)}: {int((~same).sum())} of {same.numel()} differ"


FP32, BF16 = torch.float32, torch.bfloat16
#: The interpreter takes seconds for what a GPU does at once.
LONG = () if DEVICE.type == "cuda" else pytest.mark.long


@pytest.mark.parametrize(
    ("bits", "dtypes", "columns", "block_size"),
    [
        ((4, 2), (FP32, FP32), 256, 128),
        ((4, 2), (BF16, BF16), 256, 128),
        pytest.param((2, 2), (BF16, FP32), 64, 64, marks=LONG),
        ((3, 2), (FP32, BF16), 200, 64),
        ((2, 3), (FP32, FP32), 133, 64),
        pytest.param((3, 4), (BF16, BF16), 133, 128, marks=LONG),
        ((8, 8), (FP32, FP32), 200, 128),
        pytest.param((4, 3), (FP32, FP32), 256, 256, marks=LONG),
        ((8, 4), (BF16, BF16), 144, 72),
        pytest.param((2, 8), (FP32, FP32), 160, 128, marks=LONG),
        pytest.param((4, 32), (BF16, BF16), 133, 64, marks=LONG),
        ((32, 2), (FP32, FP32), 200, 256),
        ((32, 32), (BF16, BF16), 77, 128),
    ],
)
def test_three_steps_are_the_references(
    bits: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], columns: int, block_size: int
) -> None:
    compare([new_tensor(7, columns, hyperparameters(bits, block_size), dtypes)])


@pytest.mark.parametrize(
    ("bits", "columns", "block_size"),
    [
        ((4, 2), 256, 128),
        ((3, 3), 133, 64),
        pytest.param((2, 8), 200, 72, marks=LONG),
        pytest.param((8, 32), 64, 64, marks=LONG),
        ((32, 4), 77, 256),
    ],
)
def test_steps_with_bf16_scales_are_the_references(bits: tuple[int, int], columns: int, block_size: int) -> None:
    for stochastic in (True, False):
        hyper = hyperparameters(bits, block_size, stochastic_rounding=stochastic)
        compare([new_tensor(7, columns, hyper, scale_dtype=BF16)], steps=2)


def test_scales_of_either_type_step_together_and_bf16_ones_stay_finite() -> None:
    hyper = hyperparameters((4, 2), beta1=0.0, beta2=0.0)
    expected = [new_tensor(5, 128, hyper, number=i, scale_dtype=dtype) for i, dtype in enumerate((FP32, BF16))]
    ours = [on_device(tensor) for tensor in expected]
    for tensor in (*expected, *ours):
        tensor.grad.fill_(LARGEST_SQUARABLE)
    assert step_triton(ours) == [solo_step_reference(tensor) for tensor in expected] == [False, False]
    for reference, got in zip(expected, ours, strict=True):
        assert_equal(reference, got)
        assert got.state["exp_avg_sq_scale"].isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nearest_rounding_and_ascent_are_the_references(dtype: torch.dtype) -> None:
    hyper = hyperparameters((4, 2), stochastic_rounding=False, bf16_stochastic_rounding=False, maximize=True)
    compare([new_tensor(7, 200, hyper, (dtype, dtype))])


@pytest.mark.parametrize("quantile", [0.0, pytest.param(0.5, marks=LONG), 0.99])
def test_any_quantile_is_the_references(quantile: float) -> None:
    compare([new_tensor(7, 100, hyperparameters((4, 2), 64, quantile=quantile))], steps=2)


def test_six_tensors_of_different_settings_step_together() -> None:
    usual, wide, full = hyperparameters((4, 2)), hyperparameters((8, 8)), hyperparameters((32, 32), lr=0.1)
    shapes = [(8, 128, usual), (3, 1024, usual), (40, 96, usual), (6, 256, wide), (1, 5, full), (1, 300, full)]
    compare([new_tensor(rows, columns, hyper, number=i) for i, (rows, columns, hyper) in enumerate(shapes)], steps=2)


def test_a_program_takes_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solo_triton, "_PROGRAMS_PER_PROCESSOR", 0)
    monkeypatch.setattr(solo_triton, "_WARP_CALLS", 128)
    compare([new_tensor(33, 128, hyperparameters((4, 2)))], steps=1)


@pytest.mark.parametrize(
    ("bad", "dtype"), [(float("nan"), FP32), pytest.param(float("inf"), BF16, marks=LONG), (-1e30, FP32)]
)
def test_a_tensor_with_a_bad_gradient_is_left_alone_and_counted(bad: float, dtype: torch.dtype) -> None:
    hyper = hyperparameters((4, 2))
    expected, ours = compare([new_tensor(2, 64, hyper, (dtype, dtype), i) for i in range(3)], steps=1)
    for tensor in (expected[1], ours[1]):
        tensor.grad[1, 60] = bad
    skipped = [solo_step_reference(tensor) for tensor in expected]
    assert step_triton(ours) == skipped == [False, True, False]
    for reference, got in zip(expected, ours, strict=True):
        assert_equal(reference, got)
    assert [int(tensor.skips) for tensor in ours if tensor.skips is not None] == [0, 1, 0]
    ours[1].grad.zero_()
    assert step_triton(ours) == [False] * 3  # the flag is taken back


def test_changed_hyperparameters_are_followed_without_compiling_again() -> None:
    expected, ours = compare([new_tensor(5, 128, hyperparameters((4, 2)))], steps=1)
    compiled = _compiled_kernels()
    for change in ({"lr": 0.5}, {"beta1": 0.3, "beta2": 0.9}, {"weight_decay": 0.0, "eps": 1e-3, "lr": 1.0}):
        for tensor in (*expected, *ours):
            tensor.hyper = hyperparameters((4, 2), **change)
        assert step_triton(ours) == [solo_step_reference(tensor) for tensor in expected]
        assert_equal(expected[0], ours[0])
    assert _compiled_kernels() == compiled


def _compiled_kernels() -> int:
    kernel = sys.modules[KERNELS].solo_step
    caches = getattr(kernel, "device_caches", {})  # the interpreter has none
    return sum(len(cache[0]) for cache in caches.values())


def test_tensors_without_a_plain_layout_step_too() -> None:
    expected, plain = new_tensor(16, 64, hyperparameters((4, 2), 64)), new_tensor(16, 64, hyperparameters((4, 2), 64))
    ours = on_device(plain)
    ours.param, ours.grad = ours.param.t().contiguous().t(), ours.grad.t().contiguous().t()
    expected.grad.copy_(gradient(expected, 0))
    ours.grad.copy_(expected.grad)
    assert step_triton([ours]) == [solo_step_reference(expected)]
    assert not ours.param.is_contiguous()
    assert_equal(expected, ours)


def test_tables_are_made_again_only_when_an_address_changes() -> None:
    tensor = on_device(new_tensor(5, 64, hyperparameters((4, 2), 64)))
    for _ in range(3):
        step_triton([tensor])
    assert len(solo_triton._plans) == 1
    tensor.grad = tensor.grad.clone()
    step_triton([tensor])
    assert len(solo_triton._plans) == 2


def test_cells_give_every_8_bit_code() -> None:
    """The look-up by leading bits and one comparison is the search among all midpoints, at every edge of either."""
    _, midpoints, cells = (table.cpu() for table in solo_triton._tables_of_8_bits(DEVICE))
    edges = torch.cat([midpoints[:255], (torch.arange(0, 1 << 15) << 17).to(torch.int32).view(torch.float32)])
    edges = edges[edges.abs() <= 1]
    values = torch.cat([edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0))]).clamp(-1, 1)
    values = torch.cat([values, torch.ones(1)])
    codes = cells[(values.view(torch.int32).long() & 0xFFFFFFFF) >> 17].long()
    codes += values >= midpoints[codes]
    assert torch.equal(codes.to(torch.uint8), encode_dynamic(values.view(1, -1), 8)[0].view(-1))


def test_the_cpu_path_does_not_import_triton() -> None:
    kernels = sys.modules.pop(KERNELS, None)
    try:
        tensor = new_tensor(2, 64, hyperparameters((4, 2)))
        solo_step([tensor])
        assert KERNELS not in sys.modules
    finally:
        if kernels is not None:
            sys.modules[KERNELS] = kernels
