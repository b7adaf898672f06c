"""The settings of SoloAdamW: what they may be, which of them go by a parameter's name, and what β₁ becomes."""

from typing import Any

import torch

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.dynamic import dynamic_resolution
from lowbit_lightning.kernels.solo_tensor import SoloHyperparameters
from lowbit_lightning.optim.base import ParamGroup

BITS = (2, 3, 4, 8, 32)
SCALE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: What ``overrides`` may set.
OVERRIDABLE = ("bits", "block_size", "quantile", "reference_bits", "min_numel")


def adjusted_beta1(beta1: float, bits: int, reference_bits: int | None) -> float:
    """Return β₁ lowered until a ``bits``-bit first moment is no noisier than a ``reference_bits``-bit one at ``beta1``.

    Theorem 3.6 of the paper with r(b) the median half-gap of the format: c = β₁/(1-β₁) · r(reference)/r(bits),
    β₁' = c/(1+c). Never above ``beta1``; ``reference_bits=None`` switches the adjustment off.
    """
    if reference_bits is None or bits >= reference_bits:
        return beta1
    odds = beta1 / (1 - beta1) * dynamic_resolution(reference_bits) / dynamic_resolution(bits)
    return odds / (1 + odds)


def hyperparameters(group: ParamGroup, settings: ParamGroup) -> SoloHyperparameters:
    """Return what the kernel needs of a group and of the settings by which some of its parameters differ."""
    beta1, beta2 = group["betas"]
    return SoloHyperparameters(
        lr=float(group["lr"]),
        beta1=adjusted_beta1(beta1, settings["bits"][0], settings["reference_bits"]),
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        bits=settings["bits"],
        block_size=settings["block_size"],
        quantile=settings["quantile"],
        stochastic_rounding=group["stochastic_rounding"],
        bf16_stochastic_rounding=group["bf16_stochastic_rounding"],
        maximize=group["maximize"],
        seed=group["seed"],
    )


def adamw_hyperparameters(group: ParamGroup, beta1: float) -> SoloHyperparameters:
    """Return plain AdamW's for a group: what SOLO's step is at 32 bits, with its fast paths and its bf16 rounding."""
    return SoloHyperparameters(
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=float(group["betas"][1]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        bits=(32, 32),
        block_size=128,
        quantile=0.0,
        bf16_stochastic_rounding=group["bf16_stochastic_rounding"],
        maximize=group["maximize"],
        seed=group["seed"],
    )


def normalized_overrides(overrides: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Return overrides with tuples for lists; unknown settings are refused."""
    normalized = {}
    for pattern, settings in (overrides or {}).items():
        unknown = set(settings) - set(OVERRIDABLE)
        if unknown:
            raise InvalidArgumentError(
                f"overrides[{pattern!r}] sets {sorted(unknown)}, which cannot be overridden by name: "
                f"use {', '.join(OVERRIDABLE)}, or a parameter group of its own"
            )
        normalized[pattern] = {k: tuple(v) if k == "bits" else v for k, v in settings.items()}
    return normalized


def check_settings(settings: ParamGroup, where: str = "") -> None:
    """Refuse what is out of range, by the name of the setting; ``where`` goes before that."""

    def require(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise InvalidArgumentError(f"{where}{name}={settings[name]!r} is out of range: {allowed}")

    require("lr", float(settings["lr"]) >= 0, "a number >= 0")
    require(
        "betas", len(settings["betas"]) == 2 and all(0 <= b < 1 for b in settings["betas"]), "two numbers in [0, 1)"
    )
    require("eps", settings["eps"] >= 0, "a number >= 0")
    require("weight_decay", settings["weight_decay"] >= 0, "a number >= 0")
    bits = settings["bits"]
    require("bits", len(bits) == 2 and all(b in BITS for b in bits), f"two of {BITS} (first, second moment)")
    require(
        "block_size", settings["block_size"] >= 8 and settings["block_size"] % 8 == 0, "a multiple of 8, at least 8"
    )
    require("quantile", 0 <= settings["quantile"] < 1, "a number in [0, 1)")
    require("reference_bits", settings["reference_bits"] in (None, *range(2, 9)), "2 to 8, or None for no adjustment")
    require("scale_dtype", settings["scale_dtype"] in SCALE_DTYPES, f"one of {', '.join(SCALE_DTYPES)}")
    require("min_numel", settings["min_numel"] >= 0, "an integer >= 0")
