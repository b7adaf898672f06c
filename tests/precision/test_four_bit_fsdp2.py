"""Sharded by FSDP2 over two processes, FourBitPrecision gives the weights of one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from precision.precision_ranks import SETTINGS, train, work
from sharded import WAYS, fit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers.pytorch_utils import Conv1D
from two_processes import launched_once

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.precision import FourBitPrecision
from lowbit_lightning.stash.surgery import kind_of

launched = launched_once(work)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_end_with_the_weights_of_one(way: str, setting: str, launched: Path, tmp_path: Path) -> None:
    single = train(way, setting, tmp_path, sharded=False)
    unquantized = fit(way, tmp_path, sharded=False)["weights"]
    for rank in range(2):
        sharded = torch.load(launched / f"{rank}.pt")[way, setting]
        for name, weight in single.items():
            apart = (sharded[name] - weight).norm() / (unquantized[name] - weight).norm()
            assert apart < 0.05, f"{name}: {apart}"


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_conv1d_sharded_by_itself_is_known_as_one(mesh: dist.DeviceMesh) -> None:
    layer = Conv1D(24, 32)
    x = torch.randn(4, 32)
    plugin = FourBitPrecision(compute="32-true")
    plugin.convert_module(layer)
    expected = layer(x).detach()
    plugin.teardown()

    fully_shard(layer, mesh=mesh)
    plugin.convert_module(layer)
    assert torch.equal(layer(x), expected)
    plugin.teardown()
    assert kind_of(layer) == "linear"


def test_tensor_parallel_layers_are_refused_by_name(mesh: dist.DeviceMesh) -> None:
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    parallelize_module(module, mesh, {"1": ColwiseParallel()})
    plugin = FourBitPrecision(compute="32-true")
    plugin.convert_module(module)
    with pytest.raises(InvalidArgumentError, match=r"layer 1 is divided .*add '1' to .*exclude"):
        module(torch.randn(4, 32))
    plugin.teardown()

    FourBitPrecision(compute="32-true", exclude=["1"]).convert_module(module)
    assert module(torch.randn(4, 32)).shape == (4, 32)
