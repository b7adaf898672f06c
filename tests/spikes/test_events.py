"""SpikeEvent: it survives strict JSON and says everything in one line."""

import json
import math

import pytest

from lowbit_lightning.spikes.events import SpikeEvent

EVENT = SpikeEvent(
    kind="spike",
    step=7,
    epoch=1,
    batch=15,
    signal="loss",
    value=math.inf,
    score=math.inf,
    limit=2.5,
    rank=1,
    signals={"loss": math.inf, "grad_norm": -math.inf, "nonfinite": 3.0},
    samples=list(range(20)),
)


def test_strict_json_brings_back_the_event() -> None:
    line = json.dumps(EVENT.as_json() | {"decision": "skip"}, allow_nan=False)
    assert SpikeEvent.from_json(json.loads(line)) == EVENT


def test_nan_survives_strict_json() -> None:
    event = SpikeEvent("watch", 1, 0, 2, "val_loss", math.nan, math.inf, math.nan, 0, {}, None, "rollback")
    back = SpikeEvent.from_json(json.loads(json.dumps(event.as_json(), allow_nan=False)))
    assert math.isnan(back.value)
    assert math.isnan(back.limit)
    assert back.action == "rollback"
    assert back.samples is None


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'glitch'"):
        SpikeEvent.from_json(EVENT.as_json() | {"kind": "glitch"})


def test_message_is_one_line_with_what_and_where() -> None:
    message = EVENT.message()
    assert "\n" not in message
    for part in ("spike at step 7", "epoch 1", "batch 15", "rank 1", "loss = inf", "limit 2.5", "samples 0, 1,", "..."):
        assert part in message
