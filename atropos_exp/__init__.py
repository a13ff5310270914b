"""GRPO post-training experiments, composed by Hydra."""

__version__ = "0.1.0"
