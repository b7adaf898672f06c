from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowbit_lightning.spikes.host_copy import HostCopy


class Packed(Tensor):
    """Like torchao's quantized states: codes and scales inside, and no ``clone``."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, bits: int) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        self.codes, self.scale, self.bits = codes, scale, bits

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["codes", "scale"], self.bits

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], bits: int, size: Any, stride: Any) -> "Packed":
        return cls(parts["codes"], parts["scale"], bits)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Packed: {func}")


def packed(code: int) -> Packed:
    return Packed(torch.full((4, 8), code, dtype=torch.uint8), torch.full((4,), float(code)), 8)


def copied(value: Any) -> tuple[HostCopy, Any]:
    host = HostCopy()
    host.begin()
    tree = host.pack("value", value)
    host.end()
    return host, tree


def test_a_tensor_subclass_without_clone_goes_back_in_place() -> None:
    live = packed(1)
    pointers = live.codes.data_ptr(), live.scale.data_ptr()
    host, tree = copied({"exp_avg": live})
    for _ in range(2):
        live.codes.fill_(7)
        live.scale.fill_(7.0)
        assert host.unpack(tree, {"exp_avg": live})["exp_avg"] is live
        assert int(live.codes[0, 0]) == 1
        assert float(live.scale[0]) == 1.0
    assert (live.codes.data_ptr(), live.scale.data_ptr()) == pointers


def test_a_tensor_subclass_that_is_gone_is_made_anew() -> None:
    host, tree = copied({"exp_avg": packed(3)})
    made = host.unpack(tree, {})["exp_avg"]
    assert isinstance(made, Packed)
    assert (made.bits, int(made.codes[0, 0]), made.codes.dtype) == (8, 3, torch.uint8)
    made.codes.zero_()
    assert int(host.unpack(tree)["exp_avg"].codes[0, 0]) == 3


def test_a_dtensor_is_copied_by_its_local_shard(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    live = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)])
    local = live.to_local()
    host, tree = copied(live)
    assert type(host.tensors["value._local_tensor"]) is Tensor
    local.zero_()
    assert host.unpack(tree, live) is live
    assert torch.equal(live.to_local(), torch.arange(12.0).view(4, 3))
    assert live.to_local().data_ptr() == local.data_ptr()
    made = host.unpack(tree)
    assert isinstance(made, DTensor)
    assert made.placements == (Shard(0),)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64, torch.float64, torch.bool])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    live = {"state": torch.ones(5, dtype=dtype), "step": 3, "none": None}
    host, tree = copied(live)
    back = host.unpack(tree)
    assert back["state"].dtype == dtype
    assert (back["step"], back["none"]) == (3, None)


def test_keys_that_were_not_there_are_deleted() -> None:
    live: dict[str, Any] = {"step": 1}
    host, tree = copied(live)
    live["momentum"] = torch.ones(2)
    assert host.unpack(tree, live) is live
    assert live == {"step": 1}


def test_lists_of_tensors_grow_and_shrink() -> None:
    live = {"directions": [torch.ones(2), torch.zeros(2)]}  # as LBFGS keeps them
    host, tree = copied(live)
    live["directions"].append(torch.ones(2))
    assert [one.tolist() for one in host.unpack(tree, live)["directions"]] == [[1, 1], [0, 0]]


def test_tensors_that_are_not_contiguous_keep_their_strides() -> None:
    live = torch.arange(12.0).view(3, 4).t()
    host, tree = copied(live)
    expected = live.clone()
    live.zero_()
    assert torch.equal(host.unpack(tree, live), expected)
    assert live.stride() == (1, 4)


def test_a_tensor_of_another_shape_is_refused() -> None:
    host, _ = copied(torch.ones(3))
    with pytest.raises(RuntimeError, match="value is not what it was"):
        host.copy_into("value", torch.ones(1, 3))


def test_what_is_not_put_again_is_forgotten() -> None:
    host = HostCopy()
    for names in ("ab", "b"):
        host.begin()
        for name in names:
            host.put(name, torch.ones(4))
        host.end()
    assert host.num_bytes == 16
