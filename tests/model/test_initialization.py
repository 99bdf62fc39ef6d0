"""Initial weights: their size, and that they depend on the seed and the name of the tensor alone."""

from __future__ import annotations

import math

import pytest
import torch

from sepllm_train.config.schema import ModelConfig
from sepllm_train.model.build import build_model
from sepllm_train.model.initialization import standard_deviations
from tests.model.tiny import LLAMA, PYTHIA, VOCABULARY, tiny_config


def test_pythias_two_standard_deviations() -> None:
    usual, projection = standard_deviations(ModelConfig(layers=12, hidden=768))
    assert usual == pytest.approx(math.sqrt(2 / 3840))
    assert projection == pytest.approx(2 / 12 / math.sqrt(768))


def test_normal_standard_deviations() -> None:
    usual, projection = standard_deviations(ModelConfig(layers=8, init="normal", init_std=0.02))
    assert (usual, projection) == (0.02, 0.005)


@pytest.mark.parametrize("shape", [PYTHIA, LLAMA], ids=["pythia", "llama"])
def test_every_matrix_has_its_deviation(shape: dict, device: torch.device) -> None:
    config = tiny_config(shape)
    usual, projection = standard_deviations(config.model)
    for name, parameter in build_model(config, VOCABULARY).named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 0).all(), name
        else:
            rows = parameter[:VOCABULARY] if "layers" not in name else parameter
            expected = projection if "linear_proj" in name or "linear_fc2" in name else usual
            assert rows.std().item() == pytest.approx(expected, rel=0.06), name
            assert abs(rows.mean().item()) < 0.06 * expected, name
            assert (parameter[len(rows) :] == 0).all(), name


def test_weights_depend_on_the_seed_and_the_name_only(device: torch.device) -> None:
    def weights(seed: int, **attention: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed())
        return dict(build_model(tiny_config(attention=attention, seed=seed), VOCABULARY).named_parameters())

    first, again, other = weights(1), weights(1, sink="learned", pattern="dense"), weights(2)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert weight.dim() == 1 or not torch.equal(weight, other[name]), name
    matrices = [weight for weight in first.values() if weight.dim() == 2]
    assert len({round(weight[0, 0].item(), 7) for weight in matrices}) == len(matrices)


def test_longer_vocabulary_leaves_the_layers_as_they_are(device: torch.device) -> None:
    small, large = (dict(build_model(tiny_config(), entries).named_parameters()) for entries in (100, 300))
    for name, weight in small.items():
        if "layers" in name:
            assert torch.equal(weight, large[name]), name
