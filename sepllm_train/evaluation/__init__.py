"""Evaluation of trained models with lm-evaluation-harness, under the separator pattern, caches and baselines."""
