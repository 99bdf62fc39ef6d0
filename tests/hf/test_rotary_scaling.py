"""Scaled rotary frequencies equal transformers' own, and an exported model with them gives the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sepllm_train.base.errors import UserError
from sepllm_train.config.rotary import RotaryScalingConfig
from sepllm_train.config.schema import Config, ModelConfig, TrainingConfig
from sepllm_train.model.build import build_model
from sepllm_train.runs.open import open_run
from tests.hf.bridge_models import LLAMA_BLOCK
from tests.training.resume_worker import train_alone

transformers = pytest.importorskip("transformers", reason="transformers is an optional package: extra hf")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from sepllm_train.distributed.launch import alone  # noqa: E402
from sepllm_train.hf.architecture import to_theirs  # noqa: E402
from sepllm_train.hf.export import export_run  # noqa: E402
from sepllm_train.hf.importing import import_model  # noqa: E402

NEOX = {"layers": 1, "hidden": 128, "heads": 2, "ffn": 8, "rotary_fraction": 0.25}
LLAMA = LLAMA_BLOCK | {"layers": 1, "hidden": 256, "heads": 2, "ffn": 8, "rotary_base": 500000}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "original_max_position_embeddings": 8192, "low_freq_factor": 1.0}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    YARN,
    YARN | {"factor": 1.0},
    YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    YARN | {"attention_factor": 0.9},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    # Less than one rotation of the fastest: a ramp of no length, and of many features transformers scales none.
    YARN | {"original_max_position_embeddings": 5},
    LLAMA3 | {"factor": 8.0, "high_freq_factor": 4.0},
    LLAMA3 | {"factor": 32.0, "high_freq_factor": 2.5, "original_max_position_embeddings": 300},
]


def built(model: ModelConfig) -> Any:
    """The model, whose positions are looked at."""
    with alone():
        return build_model(Config(model=model, training=TrainingConfig(precision="fp32")), 128)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: ", ".join(f"{k} {v}" for k, v in scaling.items()))
@pytest.mark.parametrize("shape", [NEOX, LLAMA], ids=["partial", "whole"])
def test_frequencies_are_those_of_transformers(shape: dict[str, Any], scaling: dict[str, Any]) -> None:
    model = ModelConfig(**shape, rotary_scaling=RotaryScalingConfig(**scaling))
    theirs = to_theirs(Config(model=model), 128, 0)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs)
    ours = built(model)
    torch.testing.assert_close(ours.rotary_pos_emb.inv_freq, expected, rtol=5e-7, atol=0)
    plain = built(replace(model, rotary_scaling=RotaryScalingConfig())).rotary_pos_emb.inv_freq
    unscaled = scaling["factor"] == 1 or (scaling.get("original_max_position_embeddings") == 5 and shape is LLAMA)
    assert torch.allclose(plain, expected, rtol=1e-6, atol=0) == unscaled
    angles = torch.linspace(0, 3, 7)
    cos, sin = ours.rotation_by(angles)
    assert torch.equal(cos, angles.cos() * factor) and torch.equal(sin, angles.sin() * factor)
    assert (factor != 1) == (scaling["rope_type"] == "yarn" and scaling["factor"] != 1)


@pytest.mark.parametrize("shape", [NEOX, LLAMA], ids=["partial", "whole"])
def test_ntk_is_the_dynamic_one_at_a_length(shape: dict[str, Any]) -> None:
    """Which transformers scales by the length over that of training, beside a factor of its own."""
    model = ModelConfig(**shape, rotary_scaling=RotaryScalingConfig("ntk", factor=6.0))
    theirs = to_theirs(Config(model=model), 128, 0)
    assert theirs.rope_parameters["rope_type"] == "default"
    exported = theirs.rope_parameters["rope_theta"]
    theirs.rope_parameters |= {"rope_type": "dynamic", "factor": 1.0, "rope_theta": float(model.rotary_base)}
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=6 * theirs.max_position_embeddings)
    found = built(model).rotary_pos_emb.inv_freq
    torch.testing.assert_close(found, expected, rtol=5e-7, atol=0)
    features = model.rotary_features
    assert torch.equal(found, 1 / exported ** (torch.arange(0, features, 2, dtype=torch.float32) / features))


EXPORTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yarn in GPT-NeoX": ({}, YARN | {"original_max_position_embeddings": 16, "beta_fast": 2.0, "factor": 4.0}),
    "ntk in GPT-NeoX": ({"rotary_fraction": 1.0}, {"rope_type": "ntk", "factor": 4.0}),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_export_carries_the_scaling(name: str, tmp_path: Path, sample_cache: Path) -> None:
    shape, scaling = EXPORTS[name]
    run = open_run(
        train_alone(
            tmp_path,
            sample_cache,
            "scaled",
            model={**shape, "rotary_scaling": RotaryScalingConfig(**scaling)},
            training={"steps": 2, "checkpoint_interval": 2},
        )
    )
    assert run.config.model.rotary_scaling == RotaryScalingConfig(**scaling), "read back from config.yaml"
    # Which compares the logits of both.
    export_run(run, tmp_path / "theirs")
    rope = json.loads((tmp_path / "theirs" / "config.json").read_text())["rope_parameters"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="sdpa")
    with alone():
        torch.testing.assert_close(
            run.model.rotary_pos_emb.inv_freq, model.base_model.rotary_emb.inv_freq, rtol=5e-7, atol=0
        )
    assert model.base_model.rotary_emb.attention_scaling == run.config.model.rotary_scaling.attention_scaling
    if scaling["rope_type"] == "ntk":
        # All of it is in the base, which is no whole number.
        with pytest.raises(UserError, match="rope_theta=.* cannot be imported: model.rotary_base is a whole number"):
            import_model(tmp_path / "theirs", tmp_path / "ours")
        return
    assert scaling.items() <= rope.items()
    import_model(tmp_path / "theirs", tmp_path / "ours")
    assert open_run(tmp_path / "ours").config.model.rotary_scaling == run.config.model.rotary_scaling
