"""LightningModules that the recipes train. They know nothing of the techniques applied to them."""

from .causal_lm import CausalLM

__all__ = ["CausalLM"]
