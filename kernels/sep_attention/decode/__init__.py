"""Decoding with a compact cache: attention of one new token, writing and compacting the cache."""

from sep_attention.decode.op import advance, attend, write

__all__ = ["advance", "attend", "write"]
