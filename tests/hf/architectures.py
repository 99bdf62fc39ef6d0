"""What every causal class of transformers does with patterns and caches, against oracles that use none of our hooks.

`python -m tests.hf.architectures --write` rewrites the table in docs/architectures.md; without it the findings are
printed. Names of model types after it walk only those.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from sep_attention import FOREVER
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sepllm_train.hf import PatternCache, SepCache, apply_pattern, cache_argument, make_pattern
from sepllm_train.hf.hooks import decoder_of
from tests.hf.tiny_models import SEPARATORS, VOCABULARY, Oracle, left_padded, random_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
COLUMNS = ("mask", "kernel", "pattern cache", "training", "cache")
HEADINGS = ("pattern as mask", "kernel", "PatternCache", "SepCache, training positions", "SepCache, in-cache positions")
# Tokens of a text: a number that is no size of the models, so that scores of attention are known by their shape.
TOKENS = 23
PADDING = 4
WINDOW, INITIAL = 4, 2
SIZES = {"initial": 2, "separators": 3, "window": 4, "capacity": 12}
CONTEXT, NARROW = 256, 14
TOLERANCE = 1e-5
LARGEST = 15_000_000

# Sizes of tiny models, for whichever of these a configuration has.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_global_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "attention_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("v_head_dim", "swa_v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "dim_head"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "rotary_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("dense_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "num_expert_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "index_head_dim", "o_lora_rank"), 16),
    **dict.fromkeys(("index_n_heads", "hc_mult", "first_k_dense_replace"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input", "mamba_d_state", "mamba_n_groups", "ssm_state_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("original_max_position_embeddings", "max_target_positions"), CONTEXT),
    "num_kv_shared_layers": 0,
    "mamba_n_heads": 8,
    "is_decoder": True,
    "use_cache": True,
    "alibi": False,
    "pad_token_id": 0,
}
# Names of what a model's own windows are; wide ones hide nothing, narrow ones do.
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention", "sliding_window_size")
_WINDOWS += ("attention_window_size", "index_topk", "keep_window_size")
# What some need beside it.
_KINDS = ["sliding_attention", "full_attention"]
_SHARED = {"num_hidden_layers": 4, "layer_types": _KINDS * 2, "num_kv_shared_layers": 2}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), _SHARED),
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_n_heads": 2,
    },
    "cohere_compass_text": {"layer_types": _KINDS, "rope_parameters": dict.fromkeys(_KINDS, _SECTIONS)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "reformer": {"axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 16)},
    "xlm": {"emb_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# What the walk leaves out, and why.
_IMAGES = "takes images or sound too, and is not made tiny; a model of text that it has inside may be listed"
_NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(("fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2"), _IMAGES),
    "moss_transcribe_diarize": _IMAGES,
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "needs the states of another model"),
    **dict.fromkeys(("qwen4_exp", "zamba", "zamba2"), "layers with states, in a shape that is not made tiny"),
    "dots3_note": _IMAGES,
    "blt": "takes bytes, cut into patches by a model of its own, and is not made tiny",
}

# What the page has before the version of transformers and the table.
_MARK = "Made with transformers "


def _fields(config_class: Any) -> set[str]:
    names = (
        {field.name for field in dataclasses.fields(config_class)} if dataclasses.is_dataclass(config_class) else set()
    )
    return names - set(getattr(config_class, "attribute_map", {}))


def small(config_class: Any, model_type: str, own_window: int) -> dict[str, Any]:
    """Arguments that make a configuration tiny."""
    names = _fields(config_class)
    made = {name: value for name, value in _SMALL.items() if name in names}
    made |= {name: own_window for name in _WINDOWS if name in names}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        made["num_key_value_heads"] = 4
    kinds = getattr(config_class(), "layer_types", None) if "layer_types" in names else None
    if kinds:
        distinct = list(dict.fromkeys(kinds))
        made["layer_types"] = distinct if len(distinct) > 1 else distinct * 2
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in made:
                made[name] = len(made["layer_types"])
    for name, sub in (getattr(config_class, "sub_configs", None) or {}).items():
        if dataclasses.is_dataclass(sub) and sub is not transformers.AutoConfig:
            made[name] = small(sub, sub.model_type, own_window)
    return made | _OWN.get(model_type, {})


def tiny(model_type: str, own_window: int = CONTEXT, attention: str | None = None) -> Any:
    """A random model of a type, the same every time but for its windows."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config_class = model_class.config_class
    config = config_class(**small(config_class, model_type, own_window))
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(config, **options).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type} has {size} parameters where {LARGEST} are tiny: make it smaller.")
    torch.manual_seed(0)
    model = model_class._from_config(config, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1).nan_to_num_()
    return model


# What attention does with its scores; the last is in sinks that scale its output.
_OF_SCORES = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax, torch.logsumexp)


class Hide(TorchFunctionMode):
    """Softmax of attention without what a mask hides, whatever the model does with masks.

    count: softmaxes that were changed.
    """

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.seen = seen
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_SCORES and args[0].dim() > 2:
            scores, (queries, keys) = args[0], args[0].shape[-2:]
            # An attention sink is one column more.
            if queries == TOKENS and keys in (TOKENS, TOKENS + 1):
                self.count += func is not torch.logsumexp
                hidden = torch.nn.functional.pad(~self.seen, (0, keys - TOKENS))
                args = (scores.masked_fill(hidden, torch.finfo(scores.dtype).min), *args[1:])
        return func(*args, **(kwargs or {}))


def oracle(model: Any, row: Tensor, seen: Tensor) -> Tensor:
    """Logits [T, V] of a model in eager attention, in every layer of which query i attends to the keys of seen[i]."""
    layers = model.config.get_text_config().num_hidden_layers
    with Hide(seen) as hide:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
    # More than one where layers run several times or attend twice.
    if hide.count == 0 or hide.count % layers:
        raise LookupError(f"{hide.count} softmaxes of attention in {layers} layers")
    return logits


def pattern_mask(row: Tensor) -> Tensor:
    """bool [T, T]: 0 <= i - j < max(n, R(j)), R without end for initial tokens and separators."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for query in range(TOKENS):
        for key in range(query + 1):
            permanent = key < INITIAL or int(row[key]) in SEPARATORS
            mask[query, key] = query - key < (FOREVER if permanent else WINDOW)
    return mask


def cache_mask(row: Tensor) -> Tensor:
    """bool [T, T]: keys that are in the cache of four blocks when each token comes."""
    initial, separators, window, capacity = SIZES.values()
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    kept: list[int] = []
    for query in range(TOKENS):
        kept.append(query)
        if len(kept) > capacity:
            first = len(kept) - window
            beyond = [key for key in kept[initial:first] if int(row[key]) in SEPARATORS]
            kept = [*kept[:initial], *beyond[max(0, len(beyond) - separators) :], *kept[first:]]
        mask[query, kept] = True
    return mask


def compare(found: Tensor, known: Tensor) -> str:
    """`yes`, or how far logits are apart."""
    if not bool(known.isfinite().all()):
        return "unknown: the oracle is not finite"
    off = float((found - known).abs().max()) / max(1.0, float(known.abs().max()))
    return "yes" if off <= TOLERANCE else f"WRONG: {off:.1e}"


def leaks(model: Any, row: Tensor, seen: Tensor) -> bool:
    """True when a token changes the output of one that it cannot reach through all layers."""
    reach = torch.linalg.matrix_power(seen.double(), model.config.get_text_config().num_hidden_layers) > 0
    changed = row.repeat(TOKENS, 1)
    for at in range(TOKENS):
        token = int(row[at])
        others = SEPARATORS if token in SEPARATORS else [n for n in range(1, VOCABULARY) if n not in SEPARATORS]
        changed[at, at] = others[(others.index(token) + 1) % len(others)]
    moved = (
        model(input_ids=changed, use_cache=False).logits - model(input_ids=row[None], use_cache=False).logits
    ).abs()
    moved = moved.amax(-1).T
    return bool((moved[~reach] > 1e-4 * moved.max()).any())


def refusing(model: Any, found: Callable[[], str]) -> str:
    """Result of a trial, or the sentence of its refusal."""
    try:
        return found()
    except ValueError as error:
        return f"no: {error}".replace(type(decoder_of(model)).__name__, "the model")


def walk(model_type: str) -> dict[str, str]:
    """What is found for each of COLUMNS: `yes`, `no: SENTENCE`, or anything else for what must not be."""
    wide, narrow, plain = tiny(model_type), tiny(model_type, NARROW), tiny(model_type, attention="eager")
    rows = random_rows((TOKENS, TOKENS - PADDING))
    ids, valid = left_padded(rows)
    pattern = make_pattern(wide, window=WINDOW, initial=INITIAL, separators=SEPARATORS)

    def known(row: int, mask: Callable[[Tensor], Tensor]) -> Tensor:
        # The shorter row too is run in TOKENS tokens, the last of which nothing before them sees.
        padded = torch.nn.functional.pad(rows[row], (0, TOKENS - len(rows[row])), value=1)
        return oracle(plain, padded, mask(padded))[: len(rows[row])]

    def all_rows(found: Tensor, mask: Callable[[Tensor], Tensor]) -> str:
        results = [compare(found[n, TOKENS - len(rows[n]) :], known(n, mask)) for n in range(len(found))]
        return next((result for result in results if result != "yes"), "yes")

    def put_on(implementation: str) -> str:
        apply_pattern(narrow, pattern, implementation=implementation)
        result = all_rows(narrow(input_ids=ids, attention_mask=valid).logits, pattern_mask)
        if result == "yes":
            name = cache_argument(narrow)
            cache = {name: transformers.DynamicCache(config=narrow.config)}
            parts = [
                narrow(input_ids=ids[:, a:b], attention_mask=valid[:, :b], **cache).logits
                for a, b in ((0, 17), (17, TOKENS))
            ]
            result = all_rows(torch.cat(parts, 1), pattern_mask)
        if compare(plain(input_ids=rows[0][None]).logits[0], known(0, pattern_mask)) == "yes":
            return "unknown: a pattern changes nothing"
        if result == "yes" and leaks(narrow, rows[0], pattern_mask(rows[0])):
            return "WRONG: hidden tokens change the output"
        return result

    def cached(cache: Any, mask: Callable[[Tensor], Tensor]) -> str:
        name = cache_argument(wide)
        batch = 1 if wide.config.model_type == "mpt" else 2
        parts = [
            wide(input_ids=ids[:batch, a:b], attention_mask=valid[:batch, :b], **{name: cache}).logits
            for a, b in ((0, 17), (17, 18), (18, TOKENS))
        ]
        return all_rows(torch.cat(parts, 1), mask)

    def in_cache() -> str:
        cache = SepCache(wide, **SIZES, separator_ids=SEPARATORS, positions="cache")
        found = wide(input_ids=rows[0][None], **{cache_argument(wide): cache}).logits[0]
        return compare(found, Oracle(tiny(model_type), **SIZES).run(rows[0]))

    def training() -> str:
        return cached(SepCache(wide, **SIZES, separator_ids=SEPARATORS, positions="training"), cache_mask)

    return {
        "mask": refusing(wide, lambda: put_on("mask")),
        "kernel": refusing(wide, lambda: put_on("kernel")),
        "pattern cache": refusing(wide, lambda: cached(PatternCache(wide, pattern), pattern_mask)),
        "training": refusing(wide, training),
        "cache": refusing(wide, in_cache),
    }


def model_types() -> list[str]:
    """One model type for each causal class."""
    first: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        # The one of the class's own name, in place of those that borrow it.
        if name not in first or name.lower().startswith(model_type.translate({ord("_"): "", ord("-"): ""})):
            first[name] = model_type
    return sorted(first.values())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of transformers and of training-free use."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def find(names: list[str]) -> dict[str, dict[str, str]]:
    """Results of `walk` for model types; `not tried` alone for one that cannot be made tiny."""
    found: dict[str, dict[str, str]] = {}
    for model_type in names:
        if model_type in _NOT_TRIED:
            found[model_type] = {"not tried": _NOT_TRIED[model_type]}
            continue
        with quietly():
            found[model_type] = walk(model_type)
    return found


# What the table leaves out of a sentence: what is refused, and the details of an error.
_AROUND = re.compile(
    r"the model cannot attend by a pattern: |implementation='kernel' does not suit the model: | Use 'mask'\.$|"
    r"the model does not suit this cache: |(?<=Error): .*?(?=\.$|\. Use 'mask'\.$)"
)


def render(found: dict[str, dict[str, str]]) -> str:
    """The table of `found`, with its reasons below."""
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        if not text.startswith("no: "):
            return text
        return f"no ({reasons.setdefault(_AROUND.sub('', text.removeprefix('no: ')), len(reasons) + 1)})"

    lines = [f"| model type | {' | '.join(HEADINGS)} |", "|---" * (len(HEADINGS) + 1) + "|"]
    for name, cells in found.items():
        if "not tried" not in cells:
            lines.append(f"| {name} | {' | '.join(cell(cells[column]) for column in COLUMNS)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    without: dict[str, list[str]] = {}
    for name, cells in found.items():
        if "not tried" in cells:
            without.setdefault(cells["not tried"], []).append(name)
    left = [f"- {', '.join(names)}: {reason}" for reason, names in without.items()]
    return "\n".join([*lines, *(["", "Not tried:", "", *left] if left else [])]) + "\n"


def committed() -> tuple[str, str, str]:
    """The page before its table, the version of transformers that the table is of, and the table."""
    page = PAGE.read_text()
    before, rest = page.split(_MARK)
    version, _, table = rest.partition("\n\n")
    return before, version, table


def main() -> None:
    """Walk, and print or write what is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/architectures.md")
    parser.add_argument("names", nargs="*", help="model types; all where none is given")
    options = parser.parse_args()
    found = {}
    for name in options.names or model_types():
        start = time.perf_counter()
        found |= find([name])
        print(f"{name} ({time.perf_counter() - start:.1f} s)", file=sys.stderr)
    if options.write:
        PAGE.write_text(f"{committed()[0]}{_MARK}{transformers.__version__}\n\n{render(found)}")
    else:
        print(render(found))


if __name__ == "__main__":
    main()
