"""Models of Hugging Face's transformers with separator attention: patterns, caches, and our checkpoints among them."""

from sepllm_train.hf.cache import SlotCache
from sepllm_train.hf.caches import FixedCache, FullCache, PatternCache, SepCache, StreamingCache
from sepllm_train.hf.guard import ATTENTION
from sepllm_train.hf.hooks import attach, cache_argument
from sepllm_train.hf.pattern import SEP, apply_pattern, load_model, remove_pattern
from sepllm_train.hf.separators import make_pattern, no_separators, separator_ids, trained_pattern
from sepllm_train.hf.static import Decoder, StaticSepCache

__all__ = [
    "ATTENTION",
    "SEP",
    "Decoder",
    "FixedCache",
    "FullCache",
    "PatternCache",
    "SepCache",
    "SlotCache",
    "StaticSepCache",
    "StreamingCache",
    "apply_pattern",
    "attach",
    "cache_argument",
    "load_model",
    "make_pattern",
    "no_separators",
    "remove_pattern",
    "separator_ids",
    "trained_pattern",
]
