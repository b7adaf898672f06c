"""LightningModules that the recipes train. They know nothing of the techniques applied to them."""

from lowbit_lightning.models.causal_lm import CausalLM
from lowbit_lightning.models.seq2seq import Seq2Seq
from lowbit_lightning.models.sequence_classifier import SequenceClassifier

__all__ = ["CausalLM", "Seq2Seq", "SequenceClassifier"]
