"""Trained runs: their folders, checkpoints, configurations and records, opened for reading."""
