"""``lowbit-lightning export CHECKPOINT``: a checkpoint with quantized optimizer states, as plain torch.optim.AdamW's.

For the end of an experiment with low-bit states, or the end of this package in somebody's project: the run goes on with
the stock Lightning Trainer and torch.optim.AdamW. Works from the checkpoint alone: bits and block sizes are in its
parameter groups, shapes in its weights.
"""

import pickle
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning.checkpoints import AtomicCheckpointIO
from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.optim import SoloAdamW, adamw_state_dict, state_bytes

_PROGRESS_SECONDS = 2.0


def run(checkpoint: str, out: str | None = None, force: bool = False, trust: bool = False) -> int:
    """Write ``checkpoint`` with AdamW's states in place of the quantized ones; all else in it stays as it is.

    Args:
        checkpoint: A checkpoint file of a Lightning run.
        out: A file to write, or an existing folder; by default ``NAME-adamw.ckpt`` beside ``NAME.ckpt``.
        force: Replace a file that is there already.
        trust: Load a checkpoint that holds Python objects, which may run code.

    Raises:
        InvalidArgumentError: A folder that does not exist, or a file that is there already.
        CheckpointError: Not a whole checkpoint of a Lightning run, one without quantized states, or one whose weights
            do not tell a parameter's shape.
    """
    source = Path(checkpoint)
    target = _target(source, out, force)
    content = _read(source, trust)
    states = content.get("optimizer_states") or []
    quantized = [index for index, saved in enumerate(states) if _is_quantized(saved)]
    if not quantized:
        found = sorted({key for saved in states for entry in saved["state"].values() for key in entry})
        raise CheckpointError(
            f"export: {str(source)!r} has no optimizer states of SoloAdamW in few bits to convert;"
            f" it has {', '.join(found) or 'none at all'}."
        )
    report = _reporter(sum(len(group["params"]) for index in quantized for group in states[index]["param_groups"]))
    before = after = 0
    for index in quantized:
        optimizer = _rebuilt(states[index], content["state_dict"], source)
        states[index] = adamw_state_dict(optimizer, report)
        before += state_bytes(optimizer)
        after += sum(value.nbytes for entry in states[index]["state"].values() for value in entry.values())
    AtomicCheckpointIO().save_checkpoint(content, target)
    print(
        f"{target}\nOptimizer states: {before / 1e6:,.2f} MB of SoloAdamW are now {after / 1e6:,.2f} MB of"
        " torch.optim.AdamW.\nContinue with --ckpt_path on it, with torch.optim.AdamW as the optimizer and without"
        " QuantizeOptimizerStates."
    )
    return 0


def _target(source: Path, out: str | None, force: bool) -> Path:
    name = f"{source.stem}-adamw.ckpt"
    target = source.with_name(name) if out is None else Path(out)
    if out is not None and (target.is_dir() or out.endswith(("/", "\\"))):
        target = target / name
    if not target.parent.is_dir():
        raise InvalidArgumentError(f"export: the folder {str(target.parent)!r} does not exist; create it first.")
    if target.exists() and not force:
        raise InvalidArgumentError(
            f"export: {str(target)!r} exists already; give another name with -o, or --force to replace it."
        )
    return target


def _read(source: Path, trust: bool) -> dict[str, Any]:
    """Return the checkpoint, its tensors left in the file until they are needed."""
    if source.is_dir():
        raise CheckpointError(
            f"export: {str(source)!r} is a folder. If it is a distributed checkpoint, continue the run from it for a"
            " step with save_distributed_checkpoint: false in the strategy, and export the file that this saves."
        )
    if not source.exists():
        raise CheckpointError(f"export: {str(source)!r} does not exist.")
    if not zipfile.is_zipfile(source):
        raise CheckpointError(
            f"export: {str(source)!r} is torn or no checkpoint ({source.stat().st_size:,} bytes). Use another one."
        )
    try:
        content = torch.load(source, map_location="cpu", weights_only=not trust, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"export: {str(source)!r} holds Python objects, which could run code when loaded. If you trust it, add"
            " --trust."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"export: {str(source)!r} is torn: {error}. Use another one.") from error
    if not isinstance(content, dict) or "state_dict" not in content or "pytorch-lightning_version" not in content:
        raise CheckpointError(
            f"export: {str(source)!r} is not a checkpoint of a Lightning run. For that of a loop of your own, load it"
            " there and save lowbit_lightning.optim.adamw_state_dict(optimizer)."
        )
    return content


def _is_quantized(saved: dict[str, Any]) -> bool:
    solo = all(set(SoloAdamW.layout_keys) <= set(group) for group in saved["param_groups"])
    return solo and any(key.endswith("_codes") for entry in saved["state"].values() for key in entry)


def _rebuilt(saved: dict[str, Any], weights: dict[str, Tensor], source: Path) -> SoloAdamW:
    """Return a SoloAdamW with the saved state, on parameters that take no memory.

    Raises:
        CheckpointError: The shape of a parameter with quantized states is not known, or does not fit them.
    """
    groups = []
    for group in saved["param_groups"]:
        names = group.get("param_names", group["params"])
        shapes = [
            _shape(name, saved["state"].get(saved_id, {}), weights, source)
            for name, saved_id in zip(names, group["params"], strict=True)
        ]
        params = [nn.Parameter(torch.empty(()).expand(shape), requires_grad=False) for shape in shapes]
        named = list(zip(names, params, strict=True)) if "param_names" in group else params
        groups.append({key: value for key, value in group.items() if key != "param_names"} | {"params": named})
    optimizer = SoloAdamW(groups)
    optimizer.load_state_dict(saved)
    return optimizer


def _shape(name: str | int, state: dict[str, Tensor], weights: dict[str, Tensor], source: Path) -> torch.Size:
    for full_precision in ("exp_avg", "exp_avg_sq"):
        if full_precision in state:
            return state[full_precision].shape
    if name in weights:
        return weights[str(name)].shape
    if not state:
        return torch.Size([0])
    if isinstance(name, int):
        raise CheckpointError(
            f"export: {str(source)!r} does not say which parameters its optimizer states belong to (no param_names),"
            " so their shapes are unknown. Continue the run for a step with the callback QuantizeOptimizerStates, which"
            " names them, and export what that saves."
        )
    raise CheckpointError(
        f"export: {str(source)!r} has quantized optimizer states of parameter {name!r}, but not the parameter itself,"
        " so its shape is unknown. Save the module's whole state_dict, and export that."
    )


def _reporter(total: int) -> Callable[[], None]:
    """Return what is called after every tensor, to show now and then how many are done."""
    done, shown = 0, time.monotonic()

    def report() -> None:
        nonlocal done, shown
        done += 1
        if time.monotonic() - shown >= _PROGRESS_SECONDS:
            shown = time.monotonic()
            print(f"[export] {done} of {total} tensors", file=sys.stderr, flush=True)

    return report
