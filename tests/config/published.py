"""Settings of Pythia and of SepLLM's release, as their own configuration files have them (docs/pythia.md).

Keys are those of our configuration. Pythia: EleutherAI/pythia, models/*/*.yml. SepLLM: HKUDS/SepLLM, its fork of
GPT-NeoX.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "data.sequence_length": 2048,
    # Preshuffled rows of 2,049 tokens.
    "data.order": "stored",
    "model.rotary_fraction": 0.25,
    "model.rotary_base": 10000,
    "model.tied_embeddings": False,
    "model.parallel_residual": True,
    "model.norm": "layernorm",
    "model.norm_epsilon": 1e-5,
    "model.bias": True,
    # bias-gelu-fusion: true; the configuration on Hugging Face says exact.
    "model.activation": "gelu_tanh",
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.epsilon": 1e-8,
    "optim.weight_decay": 0.1,
    "optim.clip_grad": 1.0,
    "optim.schedule": "pythia",
    "optim.warmup_fraction": 0.01,
    "training.steps": 143000,
    "training.global_batch": 1024,
    "training.precision": "fp16",
    "training.recompute": "full",
    "training.validation_interval": 40000,
    "training.validation_samples": 10240,
    "training.checkpoint_interval": 1000,
    # 0, 1, 2, 4, ... 512 and every 1,000th, all kept.
    "training.checkpoint_steps": "pythia",
    "parallel.sharded_optimizer": True,
    "seed": 1234,
}
SMALL_INIT = {"model.init": "pythia", "model.init_output_std": None}
WANG_INIT = {"model.init": "normal", "model.init_std": 0.02, "model.init_output_std": 0.0025}


def _size(layers: int, hidden: int, heads: int, lr: float, batch: tuple[int, int], **others: Any) -> dict[str, Any]:
    """batch: sequences of a micro-batch, GPUs."""
    return {
        "model.layers": layers,
        "model.hidden": hidden,
        "model.heads": heads,
        "model.ffn": 4 * hidden,
        "optim.lr": lr,
        "optim.min_lr": float(f"{lr / 10:.12g}"),
        "model.recipe.micro_batch": batch[0],
        "model.recipe.gpus": batch[1],
        "model.recipe.tensor": others.pop("tensor", 1),
        "model.recipe.vocabulary": others.pop("vocabulary", 50304),
        **SMALL_INIT,
        **{key.replace("__", "."): value for key, value in others.items()},
    }


SIZES: dict[str, dict[str, Any]] = {
    "pythia14m": _size(6, 128, 4, 1e-3, (32, 32), training__recompute="none"),
    "pythia31m": _size(6, 256, 8, 1e-3, (32, 32), training__recompute="none"),
    "pythia70m": _size(6, 512, 8, 1e-3, (32, 32)),
    "pythia160m": _size(12, 768, 12, 6e-4, (32, 32)),
    "pythia410m": _size(24, 1024, 16, 3e-4, (32, 32)),
    "pythia1b": _size(16, 2048, 8, 2.5e-4, (16, 64)),
    "pythia1.4b": _size(24, 2048, 16, 2e-4, (16, 64)),
    "pythia2.8b": _size(32, 2560, 32, 1.6e-4, (16, 64)),
    "pythia6.9b": _size(32, 4096, 32, 1.2e-4, (8, 128), tensor=2, vocabulary=50432) | WANG_INIT,
    "pythia12b": _size(36, 5120, 40, 1.2e-4, (8, 256), tensor=4, vocabulary=50688) | WANG_INIT,
}

_DENSE = {"attention.pattern": "dense"}
# Separators [15, 13, 32, 2, 28, 27, 209, 186, 187] of Pythia's tokenizer are the nine classes of `paper`.
_SEP = {
    "attention.pattern": "sep",
    "attention.separators": "paper",
    "attention.initial_tokens": 3,
    "attention.window": 64,
    "attention.full_layers": "none",
    "attention.separate_documents": False,
    # GPT-NeoX since August 2023, which the release is a fork of.
    "optim.schedule": "cosine",
    "training.validation_interval": 4000,
}
_FORK = {"optim.schedule": "cosine", "training.validation_interval": 4000}
_HEADS = {"model.heads": 32}
# Of each experiment: the size, and what its file has besides.
EXPERIMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia160m_dense": ("pythia160m", _DENSE | _FORK),
    "pythia160m_sep": ("pythia160m", _SEP),
    "pythia160m_sep_n128": ("pythia160m", _SEP | {"attention.window": 128}),
    "pythia160m_sep_n256": ("pythia160m", _SEP | {"attention.window": 256}),
    "pythia160m_sep_h": ("pythia160m", _SEP | {"attention.full_layers": "first"}),
    "pythia160m_sep_ht": ("pythia160m", _SEP | {"attention.full_layers": "first_last"}),
    "pythia160m_sep_hmt": ("pythia160m", _SEP | {"attention.full_layers": [0, 5, 11]}),
    "pythia160m_sep_n128_ht": (
        "pythia160m",
        _SEP | {"attention.window": 128, "attention.full_layers": "first_last"},
    ),
    "pythia160m_sep_n256_hmt": (
        "pythia160m",
        _SEP | {"attention.window": 256, "attention.full_layers": [0, 5, 11]},
    ),
    "pythia160m_streaming": (
        "pythia160m",
        _FORK | {"attention.pattern": "streaming", "attention.initial_tokens": 3, "attention.window": 64},
    ),
    "pythia1.4b_dense": ("pythia1.4b", _DENSE | _FORK),
    "pythia1.4b_sep": ("pythia1.4b", _SEP),
    "pythia1.4b_sep_32heads": ("pythia1.4b", _SEP | _HEADS),
    "posttrain_pythia1.4b": (
        "pythia1.4b",
        _SEP
        | {
            "optim.schedule": "pythia",
            "optim.schedule_steps": 143000,
            "optim.schedule_start": 93000,
            "training.steps": 50000,
        },
    ),
    "posttrain_pythia1.4b_n128": (
        "pythia1.4b",
        _SEP
        | {
            "attention.window": 128,
            "optim.schedule": "pythia",
            "optim.schedule_steps": 143000,
            "optim.schedule_start": 93000,
            "training.steps": 50000,
        },
    ),
    "posttrain_pythia1.4b_larger_lr": (
        "pythia1.4b",
        _SEP | {"optim.schedule": "pythia", "optim.schedule_start": 0, "training.steps": 50000},
    ),
}
# Experiments that were published nowhere.
OURS = (
    "demo_dense",
    "demo_sep",
    "probe",
    "pythia160m_sep_batches",
    "pythia160m_sep_curriculum",
    "pythia160m_sep_stochastic",
    "posttrain_pythia160m_32k",
    "posttrain_pythia160m_32k_base",
)


def facts_of_size(size: str) -> dict[str, Any]:
    """Published settings of a Pythia."""
    return COMMON | SIZES[size]


def facts_of_experiment(name: str) -> dict[str, Any]:
    """Published settings of an experiment."""
    size, own = EXPERIMENTS[name]
    return facts_of_size(size) | own
