"""Comparison of runs: validation loss against FLOPs, seconds and tokens."""

from sepllm_train.compare.cli import main

__all__ = ["main"]
