"""ResumableDataLoader: the next batch follows from plain integers."""

import random
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from lowbit_lightning.data.batch_order import EpochOrder, ReplayedOrder
from lowbit_lightning.data.resumable import ResumableDataLoader
from lowbit_lightning.errors import CheckpointError, InvalidArgumentError


class Numbers(Dataset[int]):
    """0 .. size - 1, and a note of what was read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class WorkerSeeds(Numbers):
    def __getitem__(self, index: int) -> int:
        return torch.initial_seed() % 2**31


class Stream(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        yield from range(100 * self.epoch + first, 100 * self.epoch + self.size, step)


def epoch(loader: DataLoader[Any], number: int = 0) -> list[list[int]]:
    loader.sampler.set_epoch(number)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", range(5))
def test_state_at_every_batch_leads_to_the_right_next_batch(taken: int, workers: int) -> None:
    def make() -> ResumableDataLoader:
        return ResumableDataLoader(Numbers(10), 3, shuffle=True, seed=1, num_workers=workers)

    straight = make()
    expected = epoch(straight, 2) + epoch(straight, 3)
    stopped = make()
    stopped.sampler.set_epoch(2)
    batches = iter(stopped)
    for _ in range(taken):
        next(batches)
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    # As Lightning does: an ended epoch is not entered again.
    rest = epoch(resumed, 2) if taken < 4 else []
    assert rest + epoch(resumed, 3) == expected[taken:]


def test_position_counts_what_was_yielded_and_not_what_workers_fetched() -> None:
    loader = ResumableDataLoader(Numbers(40), 2, num_workers=2)
    next(iter(loader))
    assert loader.state_dict()["batches"] == 1


def test_an_ended_epoch_is_batch_0_of_the_next() -> None:
    loader = ResumableDataLoader(Numbers(4), 2)
    epoch(loader, 5)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (6, 0)


def test_skipping_reads_no_sample() -> None:
    dataset = Numbers(10)
    loader = ResumableDataLoader(dataset, 2)
    loader.load_state_dict(loader.state_dict() | {"batches": 4})
    assert epoch(loader) == [[8, 9]]
    assert dataset.read == [8, 9]


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {
        str(epoch(ResumableDataLoader(Numbers(20), 20, shuffle=True, seed=seed), number))
        for seed in range(3)
        for number in range(3)
    }
    assert len(orders) == 9


def test_order_and_global_generators_leave_each_other_alone() -> None:
    torch.manual_seed(1)
    first = epoch(ResumableDataLoader(Numbers(20), 4, shuffle=True, num_workers=0))
    assert torch.initial_seed() == 1
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after
    assert first == epoch(ResumableDataLoader(Numbers(20), 4, shuffle=True))


def test_workers_are_seeded_by_seed_and_epoch_only() -> None:
    def seeds(seed: int, number: int) -> list[list[int]]:
        torch.rand(3)
        return epoch(ResumableDataLoader(WorkerSeeds(4), 2, seed=seed, num_workers=2), number)

    assert seeds(0, 1) == seeds(0, 1)
    assert len({str(seeds(*key)) for key in [(0, 0), (0, 1), (1, 0)]}) == 3


@pytest.mark.parametrize("size", [8, 9, 10, 1])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_dataset_as_distributed_sampler_does(size: int, drop_last: bool) -> None:
    dataset = Numbers(size)
    for rank in range(3):
        ours = EpochOrder(dataset, shuffle=False, seed=0, drop_last=drop_last, rank=rank, world_size=3)
        theirs = torch.utils.data.DistributedSampler(
            dataset, num_replicas=3, rank=rank, shuffle=False, drop_last=drop_last
        )
        assert list(ours) == list(theirs)
        assert len(ours) == len(list(ours))


def test_shuffled_ranks_are_disjoint_and_complete() -> None:
    ranks = [epoch(ResumableDataLoader(Numbers(12), 2, shuffle=True, rank=r, world_size=3)) for r in range(3)]
    assert sorted(sample for batches in ranks for batch in batches for sample in batch) == list(range(12))


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_process_neither_drops_nor_repeats(shuffle: bool) -> None:
    batches = epoch(ResumableDataLoader(Numbers(11), 4, shuffle=shuffle))
    assert sorted(sample for batch in batches for sample in batch) == list(range(11))
    assert len(batches[-1]) == 3


def test_empty_dataset_yields_nothing() -> None:
    loader = ResumableDataLoader(Numbers(0), 4, shuffle=True)
    assert len(loader) == 0
    assert epoch(loader) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_dataset_resumes_by_consuming(workers: int) -> None:
    straight = ResumableDataLoader(Stream(10), 2, num_workers=workers)
    expected = epoch(straight, 3)
    resumed = ResumableDataLoader(Stream(10), 2, num_workers=workers)
    resumed.load_state_dict(resumed.state_dict() | {"epoch": 3, "batches": 2})
    assert [batch.tolist() for batch in resumed] == expected[2:]
    assert (resumed.state_dict()["epoch"], resumed.state_dict()["batches"]) == (4, 0)


def test_iterable_dataset_without_batches_is_passed_through() -> None:
    loader = ResumableDataLoader(Stream(3), None)
    loader.sampler.set_epoch(1)
    assert list(loader) == [100, 101, 102]


def test_trainer_that_fetches_ahead_corrects_the_position() -> None:
    loader = ResumableDataLoader(Stream(6), 2)
    batches = iter(loader)
    next(batches), next(batches)
    loader.consumed = lambda: 1
    assert loader.state_dict()["batches"] == 1


def test_changed_batch_size_warns() -> None:
    state = ResumableDataLoader(Numbers(10), 2).state_dict() | {"batches": 1}
    with pytest.warns(UserWarning, match="batch_size: 2 then, 5 now"):
        ResumableDataLoader(Numbers(10), 5).load_state_dict(state)


def test_changed_length_between_epochs_is_silent() -> None:
    loader = ResumableDataLoader(Numbers(20), 2)
    loader.load_state_dict(ResumableDataLoader(Numbers(10), 2).state_dict() | {"epoch": 1})
    assert len(epoch(loader, 1)) == 10


def test_position_behind_the_end_of_a_shrunk_dataset_yields_nothing() -> None:
    state = ResumableDataLoader(Numbers(10), 2).state_dict() | {"batches": 4}
    loader = ResumableDataLoader(Numbers(6), 2)
    with pytest.warns(UserWarning, match="length: 5 then, 3 now"):
        loader.load_state_dict(state)
    assert epoch(loader) == []


def test_state_of_another_loader_is_refused() -> None:
    with pytest.raises(CheckpointError, match="lacks"):
        ResumableDataLoader(Numbers(4), 2).load_state_dict({"_num_yielded": 3})


def test_shuffle_of_an_iterable_dataset_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="shuffle=True"):
        ResumableDataLoader(Stream(4), 2, shuffle=True)


def test_replayed_sampler_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, number: int) -> list[int]:
        replayed = ReplayedOrder(WeightedRandomSampler([1.0] * 20, 20), seed)
        replayed.set_epoch(number)
        return list(replayed)

    assert order(0, 1) == order(0, 1)
    assert len({str(order(*key)) for key in [(0, 0), (0, 1), (1, 0)]}) == 3


def test_replayed_sampler_leaves_the_global_generators_alone() -> None:
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    list(ReplayedOrder(WeightedRandomSampler([1.0] * 20, 20), 0))
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
