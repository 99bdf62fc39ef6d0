"""Comparison of rows of runs: validation loss against FLOPs, seconds and tokens."""
