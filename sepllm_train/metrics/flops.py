"""FLOPs of training, the size of a model, and the peak arithmetic of known accelerators.

A multiply-add is two FLOPs. Only matrix multiplications are counted: softmax, norms, activations, rotary embeddings,
biases, the optimizer and the lookup of embeddings are not (together a few percent of a small model, less of a large
one), and neither is what activation recomputation repeats. The backward pass costs twice the forward: every product
is differentiated with respect to both of its factors.
"""

from __future__ import annotations

from dataclasses import dataclass

from sepllm_train.config.schema import ModelConfig


@dataclass(frozen=True)
class Convention:
    """One way to count: `label` fits beside an axis, `words` explain it to a reader."""

    label: str
    words: str


CONVENTIONS = {
    "model": Convention(
        "needed pairs only, causal, with LM head",
        "What the model needs: every matrix multiplication of the forward pass with the LM head, attention charged for "
        "exactly the (query, key) pairs that the pattern lets through on the real tokens, causal, times three for "
        "training. Work repeated by activation recomputation, softmax, norms and embedding lookups are left out.",
    ),
    "dense": Convention(
        "as if causal dense, with LM head",
        "The same model as if every layer attended to all earlier tokens: S(S+1)/2 pairs per sequence of S tokens and "
        "layer, LM head included, times three for training. A separator run and a dense run of one shape have the "
        "same count per token here.",
    ),
    "paper": Convention(
        "SepLLM paper: full square when dense, no LM head",
        "The convention behind the SepLLM paper's table, for reproduction only: 24h^2 + (4h + heads) S per layer and "
        "token, S being charged in full (the whole square, also the half that causal attention never computes) for a "
        "dense model but times half the attended share for a pattern, and without the LM head; times three for "
        "training. It flatters patterns: against causal dense attention the saving is smaller.",
    ),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes that the matrix multiplications of a transformer depend on.

    `vocabulary` counts the entries of the LM head without the padding of a layout, which a model does not need and
    which differs between layouts of one model; `ffn` is the width after the gate; `gated`: the MLP has a gate of the
    same width beside its input projection.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool

    @property
    def block_weights(self) -> int:
        """Entries of one block's weight matrices: query, key, value and output projections, and the MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn


def shape_of(model: ModelConfig, vocabulary: int) -> ModelShape:
    """Shape of `model` with an LM head of `vocabulary` entries."""
    return ModelShape(
        layers=model.layers,
        hidden=model.hidden,
        ffn=model.ffn,
        heads=model.heads,
        kv_heads=model.query_groups,
        head_dim=model.head_dim,
        vocabulary=vocabulary,
        gated=model.activation == "swiglu",
    )


@dataclass(frozen=True)
class FlopsCounter:
    """Training FLOPs of a model on sequences of `sequence_length` tokens, in the three conventions.

    `dense`: every layer is plain causal attention; only the paper's convention asks for it. All counts are
    whole numbers and linear in tokens and pairs (the paper's up to rounding), so they may be taken per step or over a
    whole run.
    """

    shape: ModelShape
    sequence_length: int
    dense: bool = False

    def training(self, tokens: int, pairs: int) -> dict[str, int]:
        """FLOPs of training on `tokens` tokens in whole sequences: `flops/model`, `flops/dense`, `flops/paper`.

        `pairs` is the number of visible (query, key) pairs summed over sequences and layers.
        """
        return {
            "flops/model": 3 * self._forward(tokens, pairs),
            "flops/dense": 3 * self._forward(tokens, self.causal_pairs(tokens)),
            "flops/paper": 3 * self._paper_forward(tokens, pairs),
        }

    def causal_pairs(self, tokens: int) -> int:
        """Pairs of dense causal attention on `tokens` tokens, summed over sequences and layers."""
        return self.shape.layers * tokens * (self.sequence_length + 1) // 2

    def attended_share(self, tokens: int, pairs: int) -> float:
        """Fraction of the causal triangle that `pairs` are, between 0 and 1, averaged over layers."""
        return pairs / self.causal_pairs(tokens)

    def _forward(self, tokens: int, pairs: int) -> int:
        """2 per weight and token, and 4 head_dim per head and pair: its score and its part of the weighted sum."""
        shape = self.shape
        weights = shape.layers * shape.block_weights + shape.hidden * shape.vocabulary
        return 2 * weights * tokens + 4 * shape.heads * shape.head_dim * pairs

    def _paper_forward(self, tokens: int, pairs: int) -> int:
        """SepLLM (arXiv 2412.12094, table 3): per layer and token 24h^2 + (4h + heads) S, see CONVENTIONS.

        24h^2 is twice the weights of its block (an MLP of 4h without a gate, as many key heads as query heads); for
        other blocks their own weights stand in its place. S times half the attended share is `pairs` / tokens times
        S / (S + 1): the paper takes half of the square for the triangle.
        """
        shape, length = self.shape, self.sequence_length
        per_pair = 4 * shape.heads * shape.head_dim + shape.heads
        square = shape.layers * tokens * length
        attention = per_pair * square if self.dense else per_pair * pairs * length // (length + 1)
        return 2 * shape.layers * shape.block_weights * tokens + attention


def parameter_count(model: ModelConfig, vocabulary: int) -> int:
    """Trained parameters of `model` with `vocabulary` entries, without sinks or query-key norms."""
    embeddings = vocabulary * model.hidden * (1 if model.tied_embeddings else 2)
    return embeddings + model.layers * sum(layer_parameters(model)) + norm_parameters(model)


def norm_parameters(model: ModelConfig) -> int:
    """Parameters of one norm over the hidden size: a scale, and a shift for LayerNorm."""
    return model.hidden * (2 if model.norm == "layernorm" else 1)


def layer_parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of one layer: (what tensor parallelism shards, what every rank holds whole).

    Biases of the projections back to the hidden size are added after the reduction over ranks, so they are whole.
    """
    inner = model.head_dim * (model.heads + 2 * model.query_groups)
    inner += model.ffn * (2 if model.activation == "swiglu" else 1)
    sharded = shape_of(model, 0).block_weights + (inner if model.bias else 0)
    whole = 2 * norm_parameters(model) + (2 * model.hidden if model.bias else 0)
    return sharded, whole


# Dense bf16 TFLOP/s with fp32 accumulation, from the vendors' data sheets (those quote twice as much "with sparsity").
# The first name found in the device's name counts, so variants come before the plain name they contain.
_PEAKS = (
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("H800 PCIe", 756.5),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of the device that torch calls `device_name`; None when it is not known.

    A slice of a device (MIG) has a fraction of the peak that its name does not show: None as well.
    """
    words = device_name.replace("-", " ").replace("_", " ").split()
    if "MIG" in words:
        return None
    for name, peak in _PEAKS:
        wanted = name.split()
        # Whole words, so that L4 is not found in L40 nor A10 in A100; "H100 PCIe" may have the memory size between.
        if all(word in words for word in wanted):
            return peak
    return None
