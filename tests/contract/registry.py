"""Every technique of this project, each with the smallest configuration that switches it on.

The contract tests run on every entry and on every pair of entries that can be used together. A new technique is one
more :class:`Technique` in ``TECHNIQUES``; no test needs to be written for it here.
"""

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
from contract.third_party import LEARNING_RATE

Config = dict[str, Any]


@dataclass(frozen=True)
class Technique:
    """A technique as a user would switch it on: the keys of a YAML file.

    Attributes:
        name: Test id.
        optimizer: ``class_path`` and ``init_args`` in place of the module's own AdamW, at its learning rate and
            without weight decay, so that a zero gradient means no movement. None leaves the module its own.
        callbacks: Added to the run's callbacks, in this order.
        trainer: Settings of the Trainer that belong to it, such as its strategy, plugins, or more ``max_steps``.
        excludes: Names of techniques that it makes no sense with. Two optimizers, or two values of one ``trainer``
            setting, exclude each other by themselves.
        rejects: Trainer settings that it cannot work with, and what its error at the start of fit says (a regex).
        survives_nonfinite: Whether weights stay finite after a step with infinite and NaN gradients.
        two_processes: Settings of the Trainer in place of its own under two processes.
        learns_to: What share of its first losses the last ones of a run stay below.
        moves_without_gradient: Whether it also moves what the loss is computed from but does not depend on.
    """

    name: str
    optimizer: Config | None = None
    callbacks: tuple[Config, ...] = ()
    trainer: Config = field(default_factory=dict)
    excludes: tuple[str, ...] = ()
    rejects: dict[str, str] = field(default_factory=dict)
    survives_nonfinite: bool = False
    two_processes: Config = field(default_factory=dict)
    learns_to: float = 0.75
    moves_without_gradient: bool = False

    @property
    def learning_rate(self) -> float:
        """That of its optimizer, which is the module's own unless it means something else."""
        return float(self.optimizer["init_args"]["lr"]) if self.optimizer else LEARNING_RATE


SOLO = {"bits": [4, 2], "min_numel": 0}

#: No technique at all. What the contract asks must hold here too, or the contract is wrong.
BASELINE = Technique("adamw")

TECHNIQUES = (
    Technique(
        "solo",
        optimizer={
            "class_path": "lowbit_lightning.optim.SoloAdamW",
            "init_args": {"lr": 1e-2, "weight_decay": 0.0, **SOLO},
        },
        survives_nonfinite=True,
    ),
    Technique(
        "quantize_optimizer_states",
        callbacks=(
            {
                "class_path": "lowbit_lightning.callbacks.QuantizeOptimizerStates",
                "init_args": {
                    "optimizer": {"class_path": "lowbit_lightning.optim.SoloAdamW", "init_args": {**SOLO, "seed": 1}}
                },
            },
        ),
        survives_nonfinite=True,
    ),
    Technique(
        "micro_adam",
        optimizer={
            "class_path": "lowbit_lightning.optim.MicroAdam",
            "init_args": {"lr": 1e-2, "density": 0.1, "window": 4, "min_numel": 0},
        },
        callbacks=(
            {
                "class_path": "lowbit_lightning.callbacks.CompressionMonitor",
                "init_args": {"every_n_steps": 4},
            },
        ),
        excludes=("quantize_optimizer_states",),  # it replaces any optimizer by SoloAdamW
        survives_nonfinite=True,
    ),
    Technique(
        "fzoo",
        # Steps of a length of their own: 30 of them cannot go as far as Adam's, whose coordinates all move as far.
        optimizer={"class_path": "lowbit_lightning.optim.FZOO", "init_args": {"lr": 0.1}},
        trainer={"strategy": {"class_path": "lowbit_lightning.strategies.ForwardOnlyStrategy"}},
        excludes=("quantize_optimizer_states",),  # it replaces any optimizer by SoloAdamW
        rejects={"gradient_clip_val": "there is no gradient to clip"},
        survives_nonfinite=True,
        two_processes={"strategy": {"class_path": "lowbit_lightning.strategies.ForwardOnlyDDPStrategy"}},
        learns_to=0.9,
        moves_without_gradient=True,
    ),
    Technique(
        "stable_spam",
        optimizer={
            "class_path": "lowbit_lightning.optim.StableSPAM",
            "init_args": {"lr": 1e-2, "reset_interval": 7, "schedule_steps": 20},
        },
        excludes=("quantize_optimizer_states",),  # it replaces any optimizer by SoloAdamW
        survives_nonfinite=True,
    ),
    Technique(
        "gradient_stabilizer",
        callbacks=(
            {
                "class_path": "lowbit_lightning.callbacks.GradientStabilizer",
                "init_args": {
                    "rules": ["ada_clip", {"ada_gn": {"gamma1": 0.7}}, {"momentum_reset": {"every_n_steps": 7}}]
                },
            },
        ),
        excludes=("fzoo",),  # which has no gradients
        survives_nonfinite=True,
    ),
    Technique(
        "four_bit",
        trainer={
            "plugins": [
                {
                    "class_path": "lowbit_lightning.precision.FourBitPrecision",
                    "init_args": {"weight": "int4", "group_size": 32, "rounding": "stochastic", "gradient": "fp4"},
                }
            ]
        },
        # A 4-bit grid rounds away the perturbations of the former; the others decide themselves what layers keep.
        excludes=("fzoo", "dynamic_stashing", "dsq"),
        rejects={"precision": "beside FourBitPrecision: set it to null, and compute="},
        survives_nonfinite=False,
    ),
    Technique(
        "dynamic_stashing",
        callbacks=(
            {
                "class_path": "lowbit_lightning.callbacks.DynamicStashing",
                "init_args": {"stash_only": 4},
            },
        ),
        excludes=("fzoo",),  # which has no backward pass
    ),
    Technique(
        "dsq",
        callbacks=(
            {
                "class_path": "lowbit_lightning.callbacks.DynamicStashing",
                "init_args": {"levels": [[4, 4, 4, 16], [16, 4, 4, 16]], "max_gradient_error": 0.15},
            },
        ),
        excludes=("fzoo", "dynamic_stashing"),  # the former has no backward pass, the latter is the same callback
    ),
    Technique(
        "spike_monitor",
        callbacks=(
            {
                "class_path": "lowbit_lightning.callbacks.SpikeMonitor",
                "init_args": {"min_samples": 4},
            },
        ),
    ),
    Technique(
        "spike_guard",
        callbacks=(
            {
                "class_path": "lowbit_lightning.callbacks.SpikeGuard",
                "init_args": {"snapshot": {"every_n_steps": 4, "min_age": 20}, "data": "replay"},
            },
        ),
        survives_nonfinite=True,
    ),
)


def make_sense_together(one: Technique, other: Technique) -> bool:
    """Whether both can be on in one run."""
    return not (
        one.name in other.excludes
        or other.name in one.excludes
        or (one.optimizer and other.optimizer)
        or one.trainer.keys() & other.trainer.keys() - {"max_steps"}
    )


def together(one: Technique, other: Technique) -> Technique:
    """Both in one run."""
    steps = [technique.trainer["max_steps"] for technique in (one, other) if "max_steps" in technique.trainer]
    return Technique(
        f"{one.name}+{other.name}",
        one.optimizer or other.optimizer,
        one.callbacks + other.callbacks,
        one.trainer | other.trainer | ({"max_steps": max(steps)} if steps else {}),
        rejects=one.rejects | other.rejects,
        survives_nonfinite=one.survives_nonfinite or other.survives_nonfinite,
        two_processes=one.two_processes | other.two_processes,
        learns_to=max(one.learns_to, other.learns_to),
        moves_without_gradient=one.moves_without_gradient or other.moves_without_gradient,
    )


def _cases(quick_pairs: bool) -> list[Any]:
    """The baseline, every technique, every pair. Pairs are ``long``, but for so few that each technique is in one."""
    pairs = [pair for pair in combinations(TECHNIQUES, 2) if make_sense_together(*pair)]
    quick, paired = [], set[str]()
    for both_are_new in (True, False) if quick_pairs else ():
        for one, other in pairs:
            new = {one.name, other.name} - paired
            if len(new) == 2 or (new and not both_are_new):
                quick.append((one, other))
                paired |= new
    return [
        *(pytest.param(case, id=case.name) for case in (BASELINE, *TECHNIQUES)),
        *(
            pytest.param(together(*pair), id=together(*pair).name, marks=[] if pair in quick else [pytest.mark.long])
            for pair in pairs
        ),
    ]


#: Every technique, and every pair of which a sample is quick.
CASES = _cases(quick_pairs=True)
#: Parametrizes a test over the registry; its argument is called ``technique``.
every_technique = pytest.mark.parametrize("technique", CASES)
#: The same where one technique is unlikely to change what another does: all pairs are ``long``.
each_technique = pytest.mark.parametrize("technique", _cases(quick_pairs=False))
