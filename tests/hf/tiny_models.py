"""Tiny transformers models with random weights, and an oracle of what a cache of four blocks computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sepllm_train.hf import cache_argument

VOCABULARY = 64
SEPARATORS = [3, 7, 11, 19]
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE: dict[str, dict[str, Any]] = {
    "llama3": {**_LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 512},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
_CLASSES = {
    "neox": ("GPTNeoXConfig", {"rotary_pct": 0.25}),
    "llama": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", {"rope_parameters": _ROPE["llama3"]}),
    "yarn": ("LlamaConfig", {"rope_parameters": _ROPE["yarn"]}),
    "dynamic": ("LlamaConfig", {"rope_parameters": _ROPE["dynamic"]}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "falcon": ("FalconConfig", {"alibi": False}),
    "phi": ("PhiConfig", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "attn_implementation": "eager"}),
    "cohere": ("CohereConfig", {}),
}
FAMILIES = tuple(_CLASSES)
# With layers of several kinds.
_CLASSES |= {
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]}),
    "olmo3": ("Olmo3Config", {"layer_types": ["full_attention", "sliding_attention"]}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "attn_implementation": "eager"},
    ),
    "ministral": ("MinistralConfig", {"head_dim": 16}),
    "cohere2": ("Cohere2Config", {}),
}


def tiny(name: str, layers: int = 2, **settings: Any) -> Any:
    """A random model of a family, the same every time; its weights are large, so that attention matters."""
    config_class, own = _CLASSES[name]
    implementation = own.get("attn_implementation", "sdpa")
    known = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        **({} if name in ("neox", "falcon", "phi") else {"num_key_value_heads": 2}),
        **{key: value for key, value in own.items() if key != "attn_implementation"},
        **settings,
    }
    config = getattr(transformers, config_class)(**known)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_rows(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Random sequences, i64 [length] each, without the padding's id 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """ids and attention_mask, i64 [B, T]."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    return ids, (ids > 0).long()


class Oracle(Cache):
    """One sequence, token by token, in plain lists: what stays is written down from the definition.

    Keys are stored without their rotation, in float64, and rotated to where they are at every step.
    """

    def __init__(
        self,
        model: Any,
        initial: int,
        separators: int,
        window: int,
        capacity: int,
        *,
        positions: str = "cache",
        interval: int | None = None,
    ) -> None:
        super().__init__(layers=[_OracleLayer(self) for _ in range(model.config.num_hidden_layers)])
        self.sizes = initial, separators, window, capacity
        self.model, self.positions, self.interval = model, positions, interval
        self.separators = set(SEPARATORS)
        base = model.base_model
        base = base if hasattr(base, "rotary_emb") else base.model
        self.pairs = base.config.model_type in ("gptj", "codegen") or "cohere" in type(base).__module__
        if base.config.model_type in ("gptj", "codegen"):
            self.apply = _turn_pairs
            features = base.config.rotary_dim
            self.frequencies = 10000.0 ** (-torch.arange(0, features, 2).double() / features)
        else:
            self.apply = sys.modules[type(base).__module__].apply_rotary_pos_emb
            self.frequencies = base.rotary_emb.inv_freq.double()
        self.scale = float(getattr(base.rotary_emb, "attention_scaling", 1.0))
        # (position in the text, id) of every key that is there.
        self.tokens: list[tuple[int, int]] = []
        self.lengths: list[int] = []
        self.seen = 0

    def angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions, i64 [1, W], in float64."""
        angle = places[..., None].double() * self.frequencies
        both = angle.repeat_interleave(2, -1) if self.pairs else torch.cat((angle, angle), -1)
        return both.cos() * self.scale, both.sin() * self.scale

    def step(self, token: int) -> Tensor:
        """Logits [V] after a further token."""
        initial, separators, window, capacity = self.sizes
        self.tokens.append((self.seen, token))
        self.keep = list(range(len(self.tokens)))
        if len(self.tokens) > capacity:
            first_of_window = len(self.tokens) - window
            beyond = [n for n in range(initial, first_of_window) if self._separates(*self.tokens[n])]
            newest = beyond[len(beyond) - separators :] if len(beyond) > separators else beyond
            self.keep = [*range(initial), *newest, *range(first_of_window, len(self.tokens))]
        self.tokens = [self.tokens[n] for n in self.keep]
        self.place = len(self.keep) - 1 if self.positions == "cache" else self.seen
        self.seen += 1
        self.lengths.append(len(self.tokens))
        output = self.model(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.tensor([[self.place]]),
            use_cache=True,
            **{cache_argument(self.model): self},
        )
        return output.logits[0, -1]

    def run(self, tokens: Tensor) -> Tensor:
        """Logits [T, V] of all tokens, i64 [T]."""
        return torch.stack([self.step(int(token)) for token in tokens])

    def _separates(self, position: int, token: int) -> bool:
        return token in self.separators if self.interval is None else position % self.interval == 0


def _turn_pairs(_: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor) -> tuple[None, Tensor]:
    """Keys [B, G, W, D] of which two neighbouring features each are turned as one complex number."""
    turn = torch.complex(cosine[..., ::2], sine[..., ::2])[:, None]
    return None, torch.view_as_real(torch.view_as_complex(keys.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


class _OracleLayer(CacheLayerMixin):
    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        self.oracle = oracle
        self.plain: list[Tensor] = []
        self.kept_values: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        oracle = self.oracle
        cosine, sine = oracle.angles(torch.tensor([[oracle.place]]))
        features = cosine.shape[-1]
        turning = key_states[..., :features].double()
        plain = oracle.apply(turning, turning, cosine, -sine)[1] / oracle.scale**2
        self.plain.append(torch.cat((plain, key_states[..., features:].double()), -1))
        self.kept_values.append(value_states)
        self.plain = [self.plain[n] for n in oracle.keep]
        self.kept_values = [self.kept_values[n] for n in oracle.keep]
        keys = torch.cat(self.plain, 2)
        places = range(keys.shape[2]) if oracle.positions == "cache" else (at for at, _ in oracle.tokens)
        cosine, sine = oracle.angles(torch.tensor([list(places)]))
        turned = oracle.apply(keys[..., :features], keys[..., :features], cosine, sine)[1]
        keys = torch.cat((turned, keys[..., features:]), -1)
        return keys.to(key_states.dtype), torch.cat(self.kept_values, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self.oracle.keep), 0

    def get_seq_length(self) -> int:
        return self.oracle.place

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
