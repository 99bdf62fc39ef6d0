"""Parameter groups: which settings a parameter has, and what is refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.config.load import configuration_of
from sepllm_train.config.param_groups import ParamSettings, group_sizes, muon_matrices, param_settings
from sepllm_train.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig
from sepllm_train.config.validate import validate

QKV = "decoder.layers.3.self_attention.linear_qkv.weight"
NORM = "decoder.layers.3.input_layernorm.weight"


def config_of(*groups: Any, optimizer: str = "adam", **parallel: Any) -> Config:
    return Config(
        model=ModelConfig(layers=4, hidden=32, heads=4, ffn=64),
        optim=OptimConfig(optimizer=optimizer, groups=list(groups)),
        parallel=ParallelConfig(**parallel),
    )


def test_the_first_match_counts() -> None:
    groups = [{"match": "*.3.*", "lr_factor": 0.5}, {"match": "*.weight", "lr_factor": 2, "weight_decay": 0.0}]
    config = config_of(*groups, optimizer="muon")
    validate(config, 1)
    assert param_settings(config, QKV) == ParamSettings("muon", 0.5, None)
    assert param_settings(config, NORM) == ParamSettings("adam", 0.5, None)
    assert param_settings(config, QKV.replace("3", "2")) == ParamSettings("muon", 2, 0.0)
    assert param_settings(config, QKV.replace("3", "2").replace("weight", "bias")) == ParamSettings("adam", 1.0, None)
    # Of the layers, 12 tensors in one and 6 matrices and norms in each other; the final norm, embedding and output.
    assert [size for _, size in group_sizes(config)] == [12, 3 * 6 + 3]


def test_the_optimizer_of_a_group() -> None:
    without_mlp = config_of({"match": "*.mlp.*", "optimizer": "adam"}, optimizer="muon")
    validate(without_mlp, 1)
    assert list(muon_matrices(without_mlp)) == [
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
    ]
    only_mlp = config_of({"match": "*.mlp.*.weight", "optimizer": "muon"})
    validate(only_mlp, 1)
    assert muon_matrices(only_mlp) == {"mlp.linear_fc1.weight": (64, 32), "mlp.linear_fc2.weight": (32, 64)}
    assert muon_matrices(config_of()) == {}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (["*.bias"], r"optim.groups entry \*.bias must be {match: PATTERN, "),
        ([{"lr_factor": 2}], "must be {match: PATTERN, "),
        ([{"match": "*.bias"}], "match and one more are needed"),
        (
            [{"match": "*.bias", "lr_facter": 2}],
            r"entry \*.bias: there is no key lr_facter \(did you mean lr_factor\?\)",
        ),
        ([{"match": "*.bias", "lr_factor": -1}], "lr_factor=-1 must be a number of 0 or more"),
        ([{"match": "*.bias", "lr_factor": True}], "lr_factor=True must be a number"),
        ([{"match": "*.bias", "weight_decay": float("nan")}], "weight_decay=nan must be a number"),
        ([{"match": "*.bias", "optimizer": "sgd"}], "optimizer=sgd is unknown: choose one of adam, muon"),
        (
            [{"match": "*.linear_kqv.weight", "lr_factor": 2}],
            r"match=\*.linear_kqv.weight matches no parameter .*decoder.layers.\*.self_attention.linear_qkv.weight",
        ),
        (
            [{"match": "*.bias", "lr_factor": 2}, {"match": "*norm.bias", "lr_factor": 3}],
            r"match=\*norm.bias never applies: entries before it",
        ),
        (
            [{"match": "*", "optimizer": "muon"}],
            r"optimizer=muon for decoder.final_layernorm.bias, .* and \d+ more: .* narrower match",
        ),
        ([{"match": "embedding.*", "optimizer": "muon"}], "optimizer=muon for embedding.word_embeddings.weight: "),
        (
            [{"match": "*.1.mlp.linear_fc1.weight", "optimizer": "muon"}],
            r"decoder.layers.\*.mlp.linear_fc1.weight would be Muon's in some layers and Adam's in others",
        ),
    ],
)
def test_refusals(groups: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(config_of(*groups), 1)


def test_muon_needs_whole_matrices() -> None:
    words = "parallel.sharded_optimizer=true cuts gradients into flat pieces, and Muon needs whole matrices"
    with pytest.raises(UserError, match=words):
        validate(config_of(optimizer="muon", sharded_optimizer=True), 1)
    group = {"match": "*.mlp.*.weight", "optimizer": "muon"}
    with pytest.raises(UserError, match=words):
        validate(config_of(group, sharded_optimizer=True), 1)
    # Groups of Adam's go with it.
    validate(config_of({"match": "*.mlp.*", "lr_factor": 2}, sharded_optimizer=True), 1)
    with pytest.raises(UserError, match=r"optim.optimizer=lion is unknown: choose one of adam, muon"):
        OptimConfig(optimizer="lion")


def test_groups_on_the_command_line() -> None:
    config = configuration_of(["optim.optimizer=muon", "optim.groups=[{match: '*.bias', lr_factor: 0.5}]"])
    assert config.optim.groups == [{"match": "*.bias", "lr_factor": 0.5}] and config.optim.optimizer == "muon"


def test_a_mistake_needs_no_torch(repository: Path) -> None:
    program = """
import sys
from sepllm_train.cli.main import main
code = main(["pretrain", "+experiment=demo_sep", "optim.groups=[{match: nothing, lr_factor: 2}]"])
assert code == 2 and "torch" not in sys.modules, (code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    assert "match=nothing matches no parameter of this model; the nearest are" in done.stderr
