"""Tensors are packed once, told apart by storage and version, and restored to what packing made of them."""

import gc

import pytest
import torch
from torch import Tensor

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.block_float import BoxFormat, pack_reference, unpack_reference
from lowbit_lightning.stash import Stash, StashPrecision
from lowbit_lightning.stash.autocast import Autocast
from lowbit_lightning.stash.kept import Same
from lowbit_lightning.stash.stash import _ENTRIES_BEFORE_A_PURGE


def made(bits: int = 4, **settings: object) -> Stash:
    stash = Stash(StashPrecision(bits, **settings))  # type: ignore[arg-type]
    stash.begin_step(1)
    return stash


def nearest(x: Tensor, bits: int = 4) -> Tensor:
    format = BoxFormat(bits, rounding="nearest")
    return unpack_reference(pack_reference(x, format), format, x.shape, x.dtype)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("box", [16, 64])
def test_packed_bytes_are_what_theory_says(bits: int, box: int) -> None:
    stash = made(bits, box=box)
    x = torch.randn(64, 256)
    kept = stash.keep(x, "linear", "layer")
    assert sum(tensor.nbytes for tensor in kept.tensors) == pytest.approx((bits + 8 / box) / 32 * x.nbytes, rel=1e-6)
    assert stash.meter.packed_bytes["linear"] == sum(tensor.nbytes for tensor in kept.tensors)


@pytest.mark.parametrize("view", [
    lambda x: x, lambda x: x.transpose(1, 2), lambda x: x.permute(2, 0, 1), lambda x: x[1:4], lambda x: x[..., 3:50],
    lambda x: x.flatten(), lambda x: x[:, ::2], lambda x: x[:1].expand(5, -1, -1), lambda x: x.view(6, 512)[2:, 100:],
], ids=["whole", "transposed", "permuted", "rows", "columns", "flat", "strided", "expanded", "corner"])  # fmt: skip
def test_a_view_is_restored_with_its_shape_and_the_values_of_the_codes(x: Tensor, view: object) -> None:
    seen = view(x)  # type: ignore[operator]
    kept = made(16, rounding="nearest").keep(seen, "linear", "layer")
    restored = kept.restore(kept.tensors)
    assert restored.shape == seen.shape
    assert torch.allclose(restored, seen, rtol=0, atol=2e-4)
    assert torch.equal(restored, kept.restore(kept.tensors))  # as often as autograd asks


def test_one_storage_is_packed_once_whatever_its_views(x: Tensor) -> None:
    stash = made(rounding="nearest")
    one, other = stash.keep(x, "linear", "q"), stash.keep(x.view(48, 64).T, "linear", "k")
    assert one.tensors[0] is other.tensors[0]
    assert torch.equal(other.restore(other.tensors), nearest(x).view(48, 64).T)
    assert stash.meter.packed_bytes.total() == sum(tensor.nbytes for tensor in one.tensors)


def test_a_tensor_that_has_changed_since_is_packed_anew(x: Tensor) -> None:
    stash = made(rounding="nearest")
    before = stash.keep(x, "linear", "layer")
    old = nearest(x)
    x.mul_(2)
    after = stash.keep(x, "linear", "layer")
    assert torch.equal(before.restore(before.tensors), old)
    assert torch.equal(after.restore(after.tensors), nearest(x))


def test_a_reused_address_is_not_taken_for_the_tensor_that_was_there() -> None:
    stash, memory = made(rounding="nearest"), bytearray(4 * 4096)
    kept, addresses = [], set()
    for value in range(20):
        x = torch.frombuffer(memory, dtype=torch.float32).fill_(value)  # a new tensor, at version 1, in the same memory
        addresses.add((x.data_ptr(), x._version))
        kept.append((value, stash.keep(x, "linear", "layer")))
        del x
    assert len(addresses) == 1
    for value, one in kept:
        assert torch.equal(one.restore(one.tensors), nearest(torch.full((4096,), float(value))))


def test_what_nobody_keeps_any_more_is_neither_held_nor_handed_out(x: Tensor) -> None:
    stash = made()
    kept = stash.keep(x, "linear", "layer")
    size = sum(tensor.nbytes for tensor in kept.tensors)
    assert stash.meter.live_bytes == stash.meter.peak_bytes == size
    del kept
    gc.collect()
    assert stash.meter.live_bytes == 0
    assert stash.keep(x, "linear", "layer").tensors[0].numel()
    assert stash.meter.peak_bytes == size


def test_entries_of_the_dead_are_cleared_away() -> None:
    stash = made()
    for _ in range(3 * _ENTRIES_BEFORE_A_PURGE):
        stash.keep(torch.randn(512), "linear", "layer")
    assert len(stash._entries) <= _ENTRIES_BEFORE_A_PURGE


@pytest.mark.parametrize("x", [
    torch.randn(100), torch.randn(4096).double(), torch.arange(4096), torch.randn(64, 64) > 0, torch.tensor(1.0),
    torch.empty(0, 64),
], ids=["small", "double", "integers", "booleans", "0-d", "empty"])  # fmt: skip
def test_what_cannot_be_packed_is_kept_as_it_is(x: Tensor) -> None:
    kept = made().keep(x, "linear", "layer")
    assert isinstance(kept.restore, Same)
    assert torch.equal(kept.restore(kept.tensors), x)


def test_bits_may_change_between_steps_and_32_is_not_packed(x: Tensor) -> None:
    stash = made(4, rounding="nearest")
    four = stash.keep(x, "linear", "layer")
    stash.precision.bits = 8
    eight = stash.keep(x, "linear", "layer")
    assert torch.equal(four.restore(four.tensors), nearest(x))
    assert torch.equal(eight.restore(eight.tensors), nearest(x, 8))
    stash.precision.bits = 32
    exact = stash.keep(x, "linear", "layer")
    assert torch.equal(exact.restore(exact.tensors), x)


def test_noise_is_a_function_of_seed_rank_name_step_and_call(x: Tensor) -> None:
    def codes(seed: int = 0, rank: int = 0, name: str = "layer", step: int = 1, call: int = 0) -> Tensor:
        stash = Stash(StashPrecision(4), seed, rank)
        stash.begin_step(step)
        for _ in range(call):
            stash.keep(x.clone(), "linear", name)
        return stash.keep(x.clone(), "linear", name).tensors[0]

    assert torch.equal(codes(), codes())
    for other in (codes(seed=1), codes(rank=1), codes(name="other"), codes(step=2), codes(call=1)):
        assert not torch.equal(codes(), other)


def test_what_was_noted_is_recomputed_instead_of_kept(x: Tensor) -> None:
    stash = made(rounding="nearest")
    source = stash.keep(x, "activation", "gelu")
    y = torch.nn.functional.gelu(x)
    stash.note(y, [source], torch.nn.functional.gelu, Autocast.now(x.device))
    kept = stash.keep(y.view(48, 64), "linear", "down")
    assert kept.tensors[0] is source.tensors[0]
    assert torch.equal(kept.restore(kept.tensors), torch.nn.functional.gelu(nearest(x)).view(48, 64))
    assert not torch.equal(stash.keep(y, "linear", "down", recompute=False).tensors[0], source.tensors[0])


def test_the_latest_restored_tensor_is_remembered_until_forgotten(x: Tensor) -> None:
    stash = made()
    kept, other = stash.keep(x, "linear", "q"), stash.keep(x + 1, "linear", "o")
    assert stash.restore(kept) is stash.restore(kept)
    assert stash.restore(kept, torch.bfloat16).dtype == torch.bfloat16
    assert not torch.equal(stash.restore(other), stash.restore(kept))
    stash.forget()
    del kept, other
    gc.collect()
    assert stash.meter.live_bytes == 0


@pytest.mark.parametrize(("settings", "message"), [
    ({"bits": 1}, "bits=1 is out of range"),
    ({"bits": 9}, "bits=9 is out of range"),
    ({"bits": 4, "format": "int"}, "format='int' is out of range"),
    ({"bits": 4, "box": 17}, "box=17 is out of range"),
    ({"bits": 4, "rounding": "up"}, "rounding='up' is out of range"),
    ({"bits": 4, "by_kind": {"softmax": 8}}, "kind='softmax' is out of range"),
    ({"bits": 4, "by_kind": {"norm": 1}}, "bits of norm=1 is out of range"),
])  # fmt: skip
def test_arguments_out_of_range_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        StashPrecision(**settings)  # type: ignore[arg-type]
