"""The ladder as pure arithmetic: which rung answers what, when it climbs, and that it always comes to an end."""

import itertools
import random
from typing import Any

import pytest

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.events import SpikeEvent
from lowbit_lightning.spikes.ladder import RUNGS, Ladder

STRETCH = 10


def event(batch: int = 0, kind: Any = "spike", action: Any = None, step: int | None = None) -> SpikeEvent:
    step = batch if step is None else step
    return SpikeEvent(
        kind, step, 0, batch, "loss", value=9.0, score=7.0, limit=3.0, rank=0, signals={}, samples=None, action=action
    )


def ladder(*rungs: str, max_skips: int = 2, max_rollbacks: int = 2) -> Ladder:
    return Ladder(rungs or RUNGS, max_skips, max_rollbacks, STRETCH)


def answers(ladder: Ladder, count: int, kind: str = "spike") -> list[str]:
    return [ladder.decide(event(batch, kind)) for batch in range(count)]


def test_one_trouble_climbs_rung_by_rung() -> None:
    expected = ["skip", "skip", "reset_momentum", "lower_lr", "raise_precision", "rollback"]
    assert answers(ladder(), 13) == [*expected, *expected, "skip"]


def test_isolated_spikes_are_skipped_for_ever() -> None:
    climbing = ladder()
    for batch in range(100):
        assert climbing.decide(event(batch)) == "skip"
        climbing.healthy(batch, batch)


def test_rungs_are_tried_in_the_order_given() -> None:
    assert answers(ladder("lower_lr", "skip", "reset_momentum"), 5) == [
        "lower_lr",
        "skip",
        "skip",
        "reset_momentum",
        "abort",
    ]


def test_every_legal_ladder_ends_in_abort() -> None:
    for size in range(1, 4):
        for rungs in itertools.permutations(RUNGS[:-1], size):
            for end in ((), ("abort",)):
                assert answers(ladder(*rungs, *end), 40)[-1] == "abort"


@pytest.mark.parametrize(
    "rungs", [[], ["leap"], ["skip", "skip"], ["abort", "skip"], ["skip", "Rollback"]], ids=lambda rungs: str(rungs)
)
def test_illegal_ladder_is_refused_by_name(rungs: list[str]) -> None:
    with pytest.raises(InvalidArgumentError, match="ladder"):
        Ladder(rungs, 3, 5, STRETCH)


@pytest.mark.parametrize("name", ["max_skips", "max_rollbacks", "healthy_stretch"])
def test_budget_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name}=0 is out of range"):
        Ladder(["skip"], **{"max_skips": 1, "max_rollbacks": 1, "healthy_stretch": 1} | {name: 0})


def test_divergence_is_never_skipped() -> None:
    assert answers(ladder(), 2, "divergence") == ["reset_momentum", "lower_lr"]


def test_weights_that_are_no_numbers_are_rolled_back_at_once() -> None:
    assert answers(ladder(), 3, "nonfinite_weights") == ["rollback", "rollback", "abort"]


def test_weights_that_are_no_numbers_abort_without_a_rollback() -> None:
    assert answers(ladder("skip", "reset_momentum", "lower_lr"), 1, "nonfinite_weights") == ["abort"]


def test_healthy_stretch_starts_at_the_bottom_again_and_fills_the_budget() -> None:
    climbing = ladder()
    answers(climbing, 9)  # a rollback and half the way to the next
    ended = [climbing.healthy(batch, batch) for batch in range(100, 100 + STRETCH)]
    assert ended == [False] * (STRETCH - 1) + [True]
    assert answers(climbing, 12).count("rollback") == 2


def test_shorter_stretch_leaves_the_trouble_where_it_was() -> None:
    climbing = ladder()
    answers(climbing, 4)
    for batch in range(100, 100 + STRETCH - 1):
        assert not climbing.healthy(batch, batch)
    assert climbing.decide(event(200)) == "raise_precision"


def test_batch_that_spikes_again_in_its_replay_goes_beyond_rollback() -> None:
    climbing = ladder("rollback", "lower_lr", max_rollbacks=5)
    assert climbing.decide(event(7)) == "rollback"
    for batch in range(3, 7):
        climbing.healthy(batch, batch)
    assert climbing.caused_rollback(event(7))
    assert climbing.decide(event(7)) == "lower_lr"
    assert climbing.decide(event(8)) == "abort"


def test_new_batches_after_a_rollback_are_further_rollbacks() -> None:
    assert answers(ladder("rollback", max_rollbacks=4), 5) == ["rollback"] * 4 + ["abort"]


def test_replay_on_its_way_to_the_batch_counts_as_no_stretch() -> None:
    climbing = ladder("rollback", max_rollbacks=1)
    assert climbing.decide(event(100)) == "rollback"
    assert not any(climbing.healthy(batch, batch) for batch in range(101))
    assert [climbing.healthy(batch, batch) for batch in range(101, 101 + STRETCH)][-1]


def test_steps_made_before_count_as_no_stretch_whatever_their_data() -> None:
    climbing = ladder("rollback", max_rollbacks=1)
    assert climbing.decide(event(100)) == "rollback"
    assert not any(climbing.healthy(step, step + 500) for step in range(20, 101))
    assert climbing.decide(event(700, step=101)) == "abort"


def test_watched_metric_gets_what_it_asks_for_within_the_budget() -> None:
    climbing = ladder("skip")
    assert climbing.decide(event(kind="watch", action="raise_precision")) == "raise_precision"
    wishes = [climbing.decide(event(kind="watch", action="rollback")) for _ in range(3)]
    assert wishes == ["rollback", "rollback", "abort"]


def test_saved_state_goes_on_where_it_was() -> None:
    events = [event(batch, kind) for batch, kind in enumerate(("spike", "divergence", "spike", "spike", "spike") * 5)]
    straight, resumed = ladder(), ladder()
    for one in events[:7]:
        straight.decide(one)
    resumed.load_state_dict(straight.state_dict())
    assert [resumed.decide(one) for one in events[7:]] == [straight.decide(one) for one in events[7:]]


def test_state_of_another_ladder_keeps_what_was_spent() -> None:
    before = ladder("skip", "rollback")
    answers(before, 6)  # two rollbacks
    after = ladder("reset_momentum", "rollback", "lower_lr")
    after.load_state_dict(before.state_dict())
    assert answers(after, 3) == ["reset_momentum", "lower_lr", "abort"]


@pytest.mark.parametrize("seed", range(20))
def test_unbroken_trouble_of_any_kind_ends(seed: int) -> None:
    chance = random.Random(seed)
    rungs = chance.sample(RUNGS[:-1], chance.randint(1, 5))
    climbing = ladder(*rungs, max_skips=3, max_rollbacks=4)
    kinds = chance.choices(["spike", "divergence", "nonfinite_weights", "watch"], k=(4 + 1) * (3 + 5))
    actions = [climbing.decide(event(i, kind, "rollback" if kind == "watch" else None)) for i, kind in enumerate(kinds)]
    assert "abort" in actions


def adversary(chance: random.Random, persistent: set[int], since_event: int, batch: int) -> bool:
    """Strikes at batches of its own, or where it hurts most: just before a healthy stretch is complete or after it."""
    return batch in persistent or (since_event in (STRETCH - 1, STRETCH) and chance.random() < 0.9)


@pytest.mark.parametrize("replays", [False, True], ids=["skip", "replay"])
@pytest.mark.parametrize("seed", range(20))
def test_run_against_an_adversary_comes_to_an_end(seed: int, replays: bool) -> None:
    """However far a rollback goes back: it is the adversary who chooses."""
    chance = random.Random(seed)
    climbing = ladder("rollback")
    persistent = {batch for batch in range(2000) if chance.random() < 0.02 * (seed % 3)}
    step = batch = since_event = executed = 0
    refilled_at: list[int] = []
    while step < 300:
        executed += 1
        assert executed < 300 // STRETCH * (climbing.max_rollbacks + 1) * (50 + STRETCH)
        if not adversary(chance, persistent, since_event, batch):
            since_event += 1
            step, batch = step + 1, batch + 1
            if climbing.healthy(step - 1, batch - 1):
                refilled_at.append(step)
            continue
        since_event = 0
        if climbing.decide(event(batch, step=step)) == "abort":
            break
        restored = chance.randint(max(step - chance.choice((5, 50)), 0), step)
        batch = batch - (step - restored) if replays else batch + 1
        step = restored
    # Every time the budget was filled up, the run had got further than ever before.
    assert refilled_at == sorted(set(refilled_at))


def test_state_of_a_ladder_with_rollback_loads_into_one_without() -> None:
    before, after = ladder("rollback"), ladder("skip")
    before.decide(event(7))
    after.load_state_dict(before.state_dict())
    assert after.decide(event(7)) == "skip"
