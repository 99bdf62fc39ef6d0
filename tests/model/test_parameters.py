"""Parameter counts of the shipped shapes against the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from sepllm_train.config.load import config_folder, register_schema, to_config
from sepllm_train.config.schema import Config
from sepllm_train.metrics.flops import parameter_count
from sepllm_train.model.build import build_model, padded_vocabulary

# Entries of the embedding and parameters, from the models' published checkpoints.
PUBLISHED = {
    "pythia14m": (50304, 14_067_712),
    "pythia31m": (50304, 30_494_720),
    "pythia70m": (50304, 70_426_624),
    "pythia160m": (50304, 162_322_944),
    "pythia410m": (50304, 405_334_016),
    "pythia1b": (50304, 1_011_781_632),
    "pythia1.4b": (50304, 1_414_647_808),
    "pythia2.8b": (50304, 2_775_208_960),
    "pythia6.9b": (50432, 6_857_302_016),
    "llama1b": (128256, 1_235_814_400),
    "llama8b": (128256, 8_030_261_248),
}
SHIPPED = sorted(path.stem for path in Path(config_folder(), "model").glob("*.yaml"))


def composed(model: str) -> Config:
    """The default run with one of configs/model/."""
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return to_config(compose("pretrain", overrides=[f"model={model}"]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_has_the_published_number_of_parameters(name: str, device: torch.device) -> None:
    config = composed(name)
    entries, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = build_model(config, entries)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert parameter_count(config.model, padded_vocabulary(entries, 1)) == parameters


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_is_whole(name: str, device: torch.device) -> None:
    config = composed(name)
    assert config.model.name == name
    assert config.model.vocabulary is None
    assert (Path(config_folder()) / "model" / f"{name}.yaml").read_text().startswith("# ")
    with torch.device("meta"):
        model = build_model(config, 4096)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameter_count(config.model, 4096)
