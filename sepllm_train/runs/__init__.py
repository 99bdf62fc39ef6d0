"""Trained runs, opened for reading.

open        `open_run`: one object for a run, its checkpoint, tokenizer, patterns, weights and held-out text
held_out    samples to evaluate on
vocabulary  tokenizer and separator class of each of its entries
evaluate    losses of each token under any attention pattern; far-recall tokens
variations  attention patterns derived from another: without a class, with other windows, with as many pairs
records     run.json and metrics.jsonl
padding     counts of older runs, which included the padding of the vocabulary
"""

from sepllm_train.runs.open import Checkpoint, TrainedRun, open_run

__all__ = ["Checkpoint", "TrainedRun", "open_run"]
