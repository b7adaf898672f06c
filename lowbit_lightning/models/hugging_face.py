"""Hugging Face models from a configuration, a folder, a hub or a package, with errors that name the argument."""

import warnings
from typing import Any

import torch
from transformers import AutoConfig

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.pretrained import locate


def load_model(kind: Any, config: dict[str, Any] | None, pretrained: str | None, attn_implementation: str) -> Any:
    """Return a model, random from ``config`` or with the weights of ``pretrained``, in fp32.

    Args:
        kind: one of the library's ``AutoModel`` classes.
        config: ``model_type`` and settings of that architecture.
        pretrained: what ``from_pretrained`` takes, or ``package:NAME``, see :mod:`lowbit_lightning.pretrained`. Weights
            are read without unpickling objects.
        attn_implementation: which attention kernel the model uses.

    Raises:
        InvalidArgumentError: neither or both of ``config`` and ``pretrained``, or one that cannot be loaded.
    """
    if (config is None) == (pretrained is None):
        raise InvalidArgumentError(
            f"config={config!r}, pretrained={pretrained!r}: give exactly one of them, a configuration to train "
            "from scratch or the path or name of pretrained weights"
        )
    if config is not None:
        try:
            return kind.from_config(AutoConfig.for_model(**config), attn_implementation=attn_implementation)
        except (TypeError, ValueError, ImportError, AttributeError) as error:
            raise InvalidArgumentError(f"config={config!r} makes no {kind.__name__}: {error}") from error
    located = locate(str(pretrained), "pretrained")
    try:
        # fp32 whatever the files hold: the Trainer's precision decides what training runs in.
        return kind.from_pretrained(
            located, attn_implementation=attn_implementation, dtype=torch.float32, weights_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise InvalidArgumentError(
            f"pretrained={pretrained!r} cannot be loaded: {error}. Give a folder written by save_pretrained, "
            "package:NAME, or a hub name while the hub can be reached"
        ) from error


def with_adapters(model: Any, lora: dict[str, Any]) -> Any:
    """Return the model frozen, with trainable low-rank adapters in it.

    Args:
        model: changed in place.
        lora: arguments of ``peft.LoraConfig``.

    Raises:
        InvalidArgumentError: peft is not installed, or does not take the arguments.
    """
    try:
        from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found, import-untyped]
    except ImportError as error:
        raise InvalidArgumentError(f"lora={lora!r} needs peft: pip install peft") from error
    try:
        with warnings.catch_warnings():
            # peft asks transformers by a name that has changed; only peft can mend it.
            warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")
            return get_peft_model(model, LoraConfig(**lora))
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"lora={lora!r}: {error}") from error
