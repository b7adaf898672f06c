"""The arithmetic: pure functions on tensors, each with a readable reference and, where it pays, a fast path.

Installed as ``lowbit_lightning.kernels`` (a top-level ``kernels`` would shadow the Hugging Face package of that name),
so imports in here are relative. Nothing in this room knows of optimizers or Lightning.
"""
