"""Separator attention: the plan of a micro-batch, the op and its backends, exact pair counts."""

from sep_attention.decode import advance, attend, write
from sep_attention.decode.cache import DecodeCache
from sep_attention.op import BackendChoice, available_backends, select_backend, sep_attention
from sep_attention.pairs import attended_pairs, keys_per_query
from sep_attention.plan import FOREVER, AttentionPlan, build_plan
from sep_attention.reference import reference_attention, visible_mask

__all__ = [
    "FOREVER",
    "AttentionPlan",
    "BackendChoice",
    "DecodeCache",
    "advance",
    "attend",
    "attended_pairs",
    "available_backends",
    "build_plan",
    "keys_per_query",
    "reference_attention",
    "select_backend",
    "sep_attention",
    "visible_mask",
    "write",
]
