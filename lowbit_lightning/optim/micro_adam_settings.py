"""The settings of MicroAdam: what they may be, and what the kernels need of them."""

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.micro_adam_tensor import MicroAdamHyperparameters
from lowbit_lightning.kernels.top_k import LARGEST_BLOCK
from lowbit_lightning.optim.base import ParamGroup


def hyperparameters(group: ParamGroup) -> MicroAdamHyperparameters:
    """Return what the kernels need of a group."""
    return MicroAdamHyperparameters(
        lr=float(group["lr"]),
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        window=group["window"],
        topk_block=group["topk_block"],
        error_block=group["error_block"],
        density=None if group["density"] == "auto" else group["density"],
        density_bounds=group["density_bounds"],
        caught_target=group["caught_target"],
        window_correction=group["bias_correction"] == "window",
        stochastic_error=group["error_rounding"] == "stochastic",
        feedback=group["feedback"],
        bf16_stochastic_rounding=group["bf16_stochastic_rounding"],
        maximize=group["maximize"],
        seed=group["seed"],
    )


def check_settings(settings: ParamGroup) -> None:
    """Refuse what is out of range, by the name of the setting."""

    def require(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise InvalidArgumentError(f"{name}={settings[name]!r} is out of range: {allowed}")

    def is_count(name: str, least: int, most: float = float("inf")) -> bool:
        return isinstance(settings[name], int) and least <= settings[name] <= most

    betas, density, bounds = settings["betas"], settings["density"], settings["density_bounds"]
    require("lr", float(settings["lr"]) >= 0, "a number >= 0")
    require("betas", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    require("eps", settings["eps"] >= 0, "a number >= 0")
    require("weight_decay", settings["weight_decay"] >= 0, "a number >= 0")
    require("window", is_count("window", 1), "an integer >= 1")
    is_share = isinstance(density, int | float) and 0 < density <= 1
    require("density", is_share or density == "auto", "a number in (0, 1], or auto")
    require("topk_block", is_count("topk_block", 1, LARGEST_BLOCK), f"an integer from 1 to {LARGEST_BLOCK}")
    require("error_block", is_count("error_block", 2) and settings["error_block"] % 2 == 0, "an even integer >= 2")
    require("min_numel", is_count("min_numel", 0), "an integer >= 0")
    require("error_rounding", settings["error_rounding"] in ("nearest", "stochastic"), "nearest or stochastic")
    require("bias_correction", settings["bias_correction"] in ("global", "window"), "global or window")
    require("feedback", 0 <= settings["feedback"] < 1, "a number in [0, 1)")
    require("caught_target", 0 < settings["caught_target"] <= 1, "a number in (0, 1]")
    ordered = len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= 1
    require("density_bounds", ordered, "two numbers in (0, 1], the lower one first")
