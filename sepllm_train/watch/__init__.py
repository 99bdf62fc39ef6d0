"""A page on this machine that follows runs from their metrics.jsonl."""

from sepllm_train.watch.server import serve

__all__ = ["serve"]
