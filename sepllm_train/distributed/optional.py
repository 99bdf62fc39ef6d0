"""Optional packages that megatron-core and the attention use when they are there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# (name shown, module looked for, what it does, what does it instead). NVIDIA's apex is recognised by its compiled
# extension: the package index also carries an unrelated package called apex.
OPTIONAL = (
    ("apex", "amp_C", "fused Adam", "torch's fused Adam"),
    ("transformer_engine", "transformer_engine", "fused Adam", "torch's fused Adam"),
    ("flash_attn", "flash_attn", "dense attention", "torch's scaled_dot_product_attention"),
)
# Compiled extensions without which NVIDIA's apex has no fused norms, and the norms that it has.
APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")
APEX_NORMS = {"layernorm": "FusedLayerNorm", "rmsnorm": "FusedRMSNorm"}


def optional_packages() -> str:
    """One line that names the optional packages which are importable, and what is used in place of the others."""
    parts = []
    for name, module, use, instead in OPTIONAL:
        found = importlib.util.find_spec(module) is not None
        parts.append(f"{name} {'found: ' + use if found else 'not found: ' + instead + ' instead'}")
    return "optional packages: " + " | ".join(parts)


def apex_norm(norm: str, *, cuda: bool) -> type[Any] | None:
    """Apex's fused class for model.norm=`norm`; None without a GPU, NVIDIA's apex or its extensions.

    The class is torch's norm with one kernel forward and two backward, called as Class(size, eps=...), with the same
    parameters.
    """
    if not cuda or any(importlib.util.find_spec(extension) is None for extension in APEX_EXTENSIONS):
        return None
    try:
        normalization = importlib.import_module("apex.normalization")
    except ImportError:
        return None
    return getattr(normalization, APEX_NORMS[norm], None)
