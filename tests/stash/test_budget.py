"""Bits for a budget: within it, as good as any other choice, and the most for what gradients feel most."""

import itertools
from typing import Any

import pytest

from lowbit_lightning.stash.budget import SENSITIVITY, bits_within, lowest_bits

ELEMENTS: dict[Any, int] = {"linear": 300, "attention": 500, "activation": 800, "norm": 200}


def size(bits: dict[Any, int]) -> float:
    return sum(ELEMENTS.get(kind, 0) * count / 8 for kind, count in bits.items())


def error(bits: dict[Any, int]) -> float:
    return sum(SENSITIVITY[kind] * 4.0**-count for kind, count in bits.items() if ELEMENTS.get(kind))


@pytest.mark.parametrize("budget", [450, 600, 700, 900, 1200, 1500])
def test_no_choice_within_the_budget_is_much_better(budget: int) -> None:
    fixed = 30.0
    found = bits_within(budget, size(lowest_bits()) + fixed, ELEMENTS, lowest_bits())
    assert size(found) + fixed <= budget
    choices = (
        dict(zip(("linear", "attention", "activation"), some, strict=True))
        for some in itertools.product(range(2, 9), repeat=3)
    )
    best = min(error(one) for one in choices if size(one) + fixed <= budget)
    assert error(found) <= 2.5 * best  # a bit of one kind does not always fit where that of another would
    assert found["attention"] <= found["linear"]


def test_it_does_not_matter_what_the_bits_were() -> None:
    once = bits_within(900, size(lowest_bits()), ELEMENTS, lowest_bits())
    assert bits_within(900, size(once), ELEMENTS, once) == once


def test_ends_of_the_range() -> None:
    assert bits_within(0, 100, ELEMENTS, lowest_bits()) == lowest_bits()
    assert set(bits_within(1e9, 100, ELEMENTS, lowest_bits()).values()) == {8}
    assert set(bits_within(10, 5, {}, lowest_bits()).values()) == {8}
