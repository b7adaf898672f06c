"""Which rule sees which spike, and how often does it cry wolf?

python examples/spike_detection.py

Our detectors, and the rules of Lightning's SpikeDetection, llm-foundry's KillLossSpike and OLMo-core's optimizers that
skip (examples/spike_rules.py), go over the same curves: made ones, and the losses and gradient norms of two real runs
into which spikes are put (examples/spike_curves.py). Writes recall and false alarms as tables and a plot.

The real runs are in examples/results/spike_curves.json; `--record 1200` trains them again (minutes).
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import evidence
import matplotlib
from spike_curves import FAULTY, HEALTHY, RECORDED, STEPS, Curve, record, recorded, with_spikes
from spike_rules import RULES, Rule

NOTE = """

Made curves: {:,} steps, {} seeds. Recorded: 1,200 steps of the quickstart with short sequences, 4,800 of a small
network whose corpus changes half-way, one seed each. The recorded runs ended well, so every alarm on them counts as
false; ours on the quickstart are gradient norms at 3 to 5 times their median, which the run's clipping tames.
"""


def alarms(rule: Rule, curve: Curve) -> list[bool]:
    return [rule(float(loss), float(norm)) for loss, norm in zip(curve.loss, curve.norm, strict=True)]


def score(rule: str, curves: Iterable[Curve]) -> dict[str, float | None]:
    """Return the share of faults seen, the false alarms per 10,000 healthy steps, and the median delay in steps."""
    seen, healthy, false_alarms, delays = [], 0, 0, []
    for curve in curves:
        raised = alarms(RULES[rule](len(curve.loss)), curve)
        hits = [next((step - fault.start for step in fault if raised[step]), None) for fault in curve.faults]
        seen += [hit is not None for hit in hits]
        delays += [hit for hit in hits if hit is not None]
        faulty = {step for fault in curve.faults for step in fault}
        healthy += len(curve.loss) - len(faulty)
        false_alarms += sum(alarm for step, alarm in enumerate(raised) if step not in faulty)
    return {
        "recall": statistics.fmean(seen) if seen else None,
        "false_alarms_per_10k": 1e4 * false_alarms / healthy,
        "delay": statistics.median(delays) if delays else None,
    }


def measure(seeds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the scores by curve and rule."""
    real = recorded()
    cases: dict[str, list[Curve]] = {}
    for name, make in FAULTY.items():
        cases[name] = [make(seed) for seed in range(seeds)]
    for size in (1.2, 1.5, 2, 5):
        cases[f"quickstart, loss × {size:g}"] = [with_spikes(real["quickstart"], size, size)]
    cases["quickstart, loss NaN"] = [with_spikes(real["quickstart"], math.nan, math.nan)]
    for name, make in HEALTHY.items():
        cases[name] = [make(seed) for seed in range(seeds)]
    for name, curve in real.items():
        cases[f"recorded: {name}"] = [curve]
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for name, curves in cases.items():
        print(name, flush=True)
        scores[name] = {rule: score(rule, curves) for rule in RULES}
    return scores


def table(scores: dict[str, dict[str, dict[str, Any]]], seeds: int) -> str:
    """Return two Markdown tables: faults seen, and false alarms."""
    rows = ["| share of faults seen | " + " | ".join(RULES) + " |", "|---" * (len(RULES) + 1) + "|"]
    for name, by_rule in scores.items():
        if by_rule["ours"]["recall"] is not None:
            cells = [_cell(by_rule[rule], "divergence" in name) for rule in RULES]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    rows += ["", "| false alarms per 10,000 steps | " + " | ".join(RULES) + " |", "|---" * (len(RULES) + 1) + "|"]
    for name, by_rule in scores.items():
        if by_rule["ours"]["recall"] is None or "NaN" in name:  # what else is faulty is as healthy between its faults
            cells = [f"{by_rule[rule]['false_alarms_per_10k']:.1f}" for rule in RULES]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + NOTE.format(STEPS, seeds)


def _cell(score: dict[str, Any], with_delay: bool) -> str:
    text = f"{score['recall']:.0%}"
    return f"{text}, after {score['delay']:.0f} steps" if with_delay and score["recall"] else text


def plot(scores: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw the share of spikes seen over their size, and the false alarms on healthy curves."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (recalls, falses) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    sizes = (1.1, 1.2, 1.5, 2, 5)
    healthy = [name for name, by_rule in scores.items() if by_rule["ours"]["recall"] is None]
    for position, rule in enumerate(RULES):
        shares = [scores[f"loss × {size:g}"][rule]["recall"] for size in sizes]
        recalls.plot(range(len(sizes)), shares, marker="o", label=rule)
        counts = [scores[name][rule]["false_alarms_per_10k"] for name in healthy]
        falses.barh([i + 0.16 * position for i in range(len(healthy))], counts, height=0.15, label=rule)
    recalls.set_xticks(range(len(sizes)), [f"× {size:g}" for size in sizes])
    recalls.set_xlabel("one step's loss and gradient norm, times")
    recalls.set_ylabel("share of spikes seen at once")
    recalls.grid(alpha=0.3)
    recalls.legend()
    falses.set_yticks([i + 0.32 for i in range(len(healthy))], healthy)
    falses.invert_yaxis()
    falses.set_xscale("symlog", linthresh=1)
    falses.set_xlabel("false alarms per 10,000 steps of healthy curves")
    falses.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="of the made curves")
    parser.add_argument(
        "--record", type=int, metavar="STEPS", help="train the recorded curves again: 1200 are committed"
    )
    parser.add_argument("--out", type=Path, default=evidence.RESULTS)
    arguments = parser.parse_args()
    if arguments.record is not None:
        RECORDED.write_text(json.dumps(record(arguments.record)))
    scores = measure(arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(scores, arguments.seeds)
    (arguments.out / "spike_detection.md").write_text(text)
    (arguments.out / "spike_detection.json").write_text(json.dumps(scores, indent=1))
    plot(scores, arguments.out / "spike_detection.png")
    readme = evidence.ROOT / "README.md"
    if arguments.out == evidence.RESULTS and "<!-- evidence:spike_detection -->" in readme.read_text():
        image = "![spikes seen, and false alarms](examples/results/spike_detection.png)"
        evidence.show_in_readme(readme, "evidence:spike_detection", f"{text}\n{image}\n")
    print(f"\n{text}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
