"""``lowbit-lightning bench WHAT``: measurements that anyone can repeat on their own machine.

This file reads and checks the command line, without importing torch: a wrong name answers at once, and not after
minutes of measuring.
"""

import argparse
import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from lowbit_lightning.errors import InvalidArgumentError

DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "bf16")
#: Name and what is stepped; the shapes are in :mod:`.bench_workloads`.
WORKLOADS = {
    "10m": "one tensor of 10M parameters",
    "100m": "one tensor of 100M parameters",
    "1b-mix": "the tensors of a 1B Llama, scaled down to what fits into memory",
    "tiny": "2000 tiny tensors: norms, biases, LoRA factors",
}
#: Of ``bench guard`` and ``bench precision``; the models are in :mod:`.bench_guard`.
GUARD_WORKLOADS = {
    "10m": "a Llama of 10M parameters",
    "100m": "a Llama of 100M parameters, minutes on a CPU",
}
#: Of ``bench zo``; the models are in :mod:`.bench_zo`.
ZO_WORKLOADS = {
    "20m": "a Llama of 20M parameters, an hour on one CPU thread with all tokens and perturbations",
    "2m": "a Llama of 2M parameters",
}
#: Of ``bench stash``; the models are in :mod:`.bench_stash`.
STASH_WORKLOADS = {
    "15m": "a Llama of 15M parameters",
    "1m": "a Llama of 1M parameters, where a step is mostly the time it takes to ask for it",
    "400m": "a Llama of 400M parameters with a vocabulary of 32000, for GPUs",
}
DEFAULT_WORKLOADS = {"cpu": ["10m", "tiny"], "cuda": list(WORKLOADS)}


def run(arguments: Sequence[str]) -> int:
    """Run ``bench`` with the arguments after that word.

    Raises:
        InvalidArgumentError: An unknown name, a number out of range, or a place to write that is not there.
    """
    options = _parser().parse_args(arguments)
    device = _one_of("--device", options.device, DEVICES)
    known, default = {
        "optim": (WORKLOADS, DEFAULT_WORKLOADS[device]),
        "guard": (GUARD_WORKLOADS, ["10m"]),
        "precision": (GUARD_WORKLOADS, ["10m"]),
        "zo": (ZO_WORKLOADS, ["20m"]),
        "stash": (STASH_WORKLOADS, {"cpu": ["15m"], "cuda": ["15m", "400m"]}[device]),
    }[options.what]
    workloads = list(dict.fromkeys(_one_of("--workload", name, known) for name in options.workload or default))
    for name, value in (("--repeats", options.repeats), ("--threads", options.threads)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"bench: {name} {value} is out of range: at least 1")
    for name in ("json", "plot"):
        path = getattr(options, name, None)
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidArgumentError(f"bench: --{name} {str(path)!r}: the folder does not exist; create it first")
    if getattr(options, "plot", None) is not None and importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgumentError("bench: --plot needs matplotlib: pip install matplotlib")
    if options.what in ("guard", "precision"):
        from lowbit_lightning.commands import bench_guard, bench_precision

        measure = bench_guard.run if options.what == "guard" else bench_precision.run
        return measure(
            device=device,
            workloads=workloads,
            repeats=options.repeats,
            threads=options.threads,
            json_file=options.json,
        )
    if options.what == "zo":
        for name in ("tokens", "perturbations", "elements"):
            values = getattr(options, name)
            for value in values if isinstance(values, list) else [values]:
                if value < 1:
                    raise InvalidArgumentError(f"bench: --{name} {value} is out of range: at least 1")
        from lowbit_lightning.commands import bench_zo

        return bench_zo.run(
            device=device,
            workloads=workloads,
            tokens=sorted(set(options.tokens)),
            perturbations=sorted(set(options.perturbations)),
            elements=options.elements,
            repeats=options.repeats,
            threads=options.threads,
            json_file=options.json,
            plot_file=options.plot,
        )
    if options.what == "stash":
        for name in ("memory", "elements"):
            if not getattr(options, name) > 0:
                raise InvalidArgumentError(f"bench: --{name} {getattr(options, name)} is out of range: more than 0")
        from lowbit_lightning.commands import bench_stash

        return bench_stash.run(
            device=device,
            workloads=workloads,
            memory=options.memory,
            elements=options.elements,
            repeats=options.repeats,
            threads=options.threads,
            json_file=options.json,
            plot_file=options.plot,
        )
    dtype = _one_of("--dtype", options.dtype, DTYPES)
    from lowbit_lightning.commands import bench_optim

    return bench_optim.run(
        device=device,
        workloads=workloads,
        dtype=dtype,
        repeats=options.repeats,
        threads=options.threads,
        json_file=options.json,
        plot_file=options.plot,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowbit-lightning bench", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    optim = verbs.add_parser(
        "optim",
        help="optimizer steps: time, memory and traffic, against torch, torchao and bitsandbytes",
        description="Measure the steps of all optimizers against each other in one run. Peers that are not installed "
        "are rows that say so: pip install torchao bitsandbytes.",
        epilog="workloads: " + "; ".join(f"{name} = {what}" for name, what in WORKLOADS.items()),
        allow_abbrev=False,
    )
    optim.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(WORKLOADS)}; by default 10m and tiny on a CPU, else all",
    )
    optim.add_argument("--dtype", default="fp32", help="of weights and gradients: fp32 (default) or bf16")
    optim.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios to torch's fused AdamW there (PNG)")
    guard = verbs.add_parser(
        "guard",
        help="what SpikeMonitor and SpikeGuard's snapshots cost, in per cent of a training step",
        description="Train a Llama on random tokens with both callbacks on and measure their share of each step.",
        epilog="workloads: " + "; ".join(f"{name} = {what}" for name, what in GUARD_WORKLOADS.items()),
        allow_abbrev=False,
    )
    precision = verbs.add_parser(
        "precision",
        help="4-bit training against bf16 and fp32: time, bytes kept for backward, peak; GradientStabilizer's share",
        description="Train a Llama on random tokens in every precision and measure steps and memory.",
        epilog="workloads: " + "; ".join(f"{name} = {what}" for name, what in GUARD_WORKLOADS.items()),
        allow_abbrev=False,
    )
    for verb in (guard, precision):
        workloads = f"{', '.join(GUARD_WORKLOADS)}; by default 10m"
        verb.add_argument("--workload", nargs="+", metavar="NAME", help=workloads)
    zo = verbs.add_parser(
        "zo",
        help="forward-only steps in forward passes, sign passes and memory, against the published way",
        description="Measure FZOO's steps, sequential and batched, against plain forward passes on the same batch.",
        epilog="workloads: " + "; ".join(f"{name} = {what}" for name, what in ZO_WORKLOADS.items()),
        allow_abbrev=False,
    )
    zo.add_argument("--workload", nargs="+", metavar="NAME", help=f"{', '.join(ZO_WORKLOADS)}; by default 20m")
    zo.add_argument(
        "--tokens", nargs="+", type=int, default=[16, 64, 256, 1024, 2048], metavar="T", help="tokens in a batch"
    )
    zo.add_argument(
        "--perturbations", nargs="+", type=int, default=[1, 4, 8, 16], metavar="N", help="of a step (1 4 8 16)"
    )
    zo.add_argument(
        "--elements", type=int, default=100_000_000, metavar="N", help="of the tensor for sign passes (default 10^8)"
    )
    zo.add_argument("--plot", type=Path, metavar="FILE", help="draw step time over forward passes there (PNG)")
    stash = verbs.add_parser(
        "stash",
        help="what DynamicStashing keeps, its time and gradient error, against checkpointing and offloading",
        description="Train one Llama in every way, in turns: plain, gradient checkpointing, save_on_cpu, packed.",
        epilog="workloads: " + "; ".join(f"{name} = {what}" for name, what in STASH_WORKLOADS.items()),
        allow_abbrev=False,
    )
    stash.add_argument("--workload", nargs="+", metavar="NAME", help=f"{', '.join(STASH_WORKLOADS)}; by default 15m")
    stash.add_argument(
        "--memory", type=float, default=8.0, metavar="GB", help="to say how large a batch fits (8, in 10^9 bytes)"
    )
    stash.add_argument(
        "--elements", type=int, default=16_000_000, metavar="N", help="of the tensor to pack alone (16 million)"
    )
    stash.add_argument("--plot", type=Path, metavar="FILE", help="draw step time over bytes kept there (PNG)")
    for verb in (optim, guard, precision, zo, stash):
        verb.add_argument("--device", default="cpu", help="cpu (default) or cuda")
        verb.add_argument("--repeats", type=int, default=10, metavar="N", help="rounds of one step each (default 10)")
        verb.add_argument("--threads", type=int, metavar="N", help="CPU threads, torch's own number by default")
        verb.add_argument("--json", type=Path, metavar="FILE", help="write everything there, with every single sample")
    return parser


def _one_of(argument: str, value: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    if value in allowed:
        return value
    closest = difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
    guess = f" Did you mean {closest[0]}?" if closest else ""
    raise InvalidArgumentError(f"bench: {argument} {value!r} is unknown; it is one of {', '.join(allowed)}.{guess}")
