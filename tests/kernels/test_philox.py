"""Philox against the vectors published with Random123, and the properties that resume and sharding rely on."""

import pytest
import torch

from lowbit_lightning.kernels.philox import block_calls, draw_16bit, element_draws, philox_4x32, stream_id

# kat_vectors of Random123 1.14, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox_4x32(tuple(torch.tensor(word) for word in counter), tuple(key))
    assert [int(word) for word in words] == expected


def test_draws_are_the_halves_of_the_words_in_planar_order() -> None:
    calls = torch.arange(5)
    draws = draw_16bit(seed=7, stream=3, step=11, calls=calls)
    zero = torch.zeros((), dtype=torch.int64)
    words = philox_4x32((calls, zero, zero + 11, zero), (7, 3))
    for lane in range(8):
        half = words[lane // 2] >> (16 * (lane % 2)) & 0xFFFF
        assert torch.equal(draws[lane * 5 : lane * 5 + 5].long(), half)


def test_a_block_draws_the_same_whether_alone_or_among_others() -> None:
    together = draw_16bit(1, 2, 3, block_calls(0, 6, 16, torch.device("cpu")))
    alone = draw_16bit(1, 2, 3, block_calls(4, 1, 16, torch.device("cpu")))
    assert torch.equal(together[4:5], alone)


def test_call_indices_beyond_32_bits_differ_from_their_low_words() -> None:
    low = draw_16bit(0, 0, 0, torch.tensor([5]))
    high = draw_16bit(0, 0, 0, torch.tensor([5 + 2**32]))
    assert not torch.equal(low, high)


def test_seed_stream_and_step_each_change_the_draws() -> None:
    calls = torch.arange(64)
    base = draw_16bit(0, 0, 0, calls)
    for other in (draw_16bit(1, 0, 0, calls), draw_16bit(0, 1, 0, calls), draw_16bit(0, 0, 1, calls)):
        assert (base == other).float().mean() < 0.02


def test_draws_are_uniform_and_uncorrelated_between_lanes() -> None:
    draws = draw_16bit(0, 0, 1, torch.arange(40_000).view(-1, 1)).double() / 65536 - 0.5
    assert abs(draws.mean()) < 3e-3
    assert abs(draws.var() - 1 / 12) < 1e-3
    correlation = torch.corrcoef(draws.T) - torch.eye(8, dtype=torch.float64)
    assert correlation.abs().max() < 0.03


def test_stream_ids_are_stable_and_distinct_by_purpose() -> None:
    assert stream_id("model.embed_tokens.weight", "state") == 337808935
    assert stream_id("w", "state") != stream_id("w", "weight")


def test_draws_of_elements_do_not_depend_on_where_a_chunk_begins() -> None:
    whole = element_draws(3, 5, 7, 0, 1000, torch.device("cpu"))
    for start, stop in ((0, 1), (100, 300), (128, 256), (999, 1000)):
        assert torch.equal(element_draws(3, 5, 7, start, stop, torch.device("cpu")), whole[start:stop])
    assert torch.equal(whole[:128], draw_16bit(3, 5, 7, torch.arange(16)))
