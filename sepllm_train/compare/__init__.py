"""Comparison of variants of runs: validation loss against FLOPs, seconds and tokens."""
