"""LightningModules that the recipes train. They know nothing of the techniques applied to them."""

from lowbit_lightning.models.causal_lm import CausalLM

__all__ = ["CausalLM"]
