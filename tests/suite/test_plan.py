"""The plan of a suite: what is run, and that it cannot change once it is fixed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sepllm_train.base.errors import UserError
from sepllm_train.config.load import config_folder, register_schema, to_config, to_dataclasses
from sepllm_train.config.validate import validate
from sepllm_train.suite.config import Config
from sepllm_train.suite.plan import data_overrides, fix_plan, make_plan, quoted, read_plan

SUITES = sorted(path.stem for path in (config_folder() / "suite").glob("*.yaml"))
SIZES = ("cpu", "gpu", "toy")


def suite(*overrides: str) -> Config:
    """The configuration of a suite's command line."""
    register_schema("suite_schema", Config)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return to_dataclasses(compose("suite", overrides=list(overrides)), Config)


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("size", SIZES)
def test_every_run_of_every_suite_is_a_sound_configuration(name: str, size: str) -> None:
    lengths = ["suite.lengths=null"] if size == "toy" else []
    config = suite(f"+suite={name}", f"suite.size={size}", *lengths)
    plan = make_plan(config, None)
    assert len(plan.runs) == len(config.suite.rows) * len(config.lengths) * len(config.seeds)
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for run in (run for run in plan.runs if run.seed == config.seeds[0]):
            composed = to_config(compose("pretrain", overrides=[*run.overrides, f"name={run.name}"]))
            validate(composed, world_size=plan.processes)
            assert composed.seed == run.seed and composed.data.sequence_length == run.length
            assert composed.training.steps == run.steps
            assert composed.training.global_batch * run.length == config.size.tokens_per_step


def test_rows_differ_in_attention_and_length_of_the_run_only() -> None:
    plan = make_plan(suite("+suite=paper"), None)
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        first, *others = [
            to_config(compose("pretrain", overrides=run.overrides))
            for run in plan.runs
            if (run.length, run.seed) == (2048, 2)
        ]
    assert first.attention.pattern == "dense"
    for other in others:
        assert other.attention != first.attention
        other.training.steps = first.training.steps
        assert (other.model, other.data, other.optim, other.training) == (
            first.model,
            first.data,
            first.optim,
            first.training,
        )


def test_a_row_keeps_its_own_keys_and_gets_those_of_the_size() -> None:
    config = suite("+suite=paper", "suite.size=toy", "suite.overrides=['attention.initial_tokens=1']")
    register_schema()
    runs = {run.row: run for run in make_plan(config, None).runs}
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        sep, wide = (to_config(compose("pretrain", overrides=runs[row].overrides)) for row in ("sep", "sep_n128"))
    assert sep.attention.window == 16, "the size's key survives the row's choice of a group"
    assert wide.attention.window == 128, "the row's own key comes last"
    assert sep.attention.initial_tokens == wide.attention.initial_tokens == 1


def test_seeds_are_the_outer_loop_so_that_a_part_is_a_whole_comparison() -> None:
    plan = make_plan(suite("+suite=paper"), None)
    assert [run.seed for run in plan.runs] == sorted(run.seed for run in plan.runs)
    config = suite("+suite=paper", "suite.only.seeds=[2]", "suite.only.rows=[sep,dense]", "suite.only.lengths=[8192]")
    assert [run.name for run in plan.selected(config.suite.only)] == ["dense_8192_seed2", "sep_8192_seed2"]


def test_a_fixed_plan_refuses_another_and_takes_the_same(tmp_path: Path, sample_prefix: Path) -> None:
    root = f"suite.root={tmp_path}"
    plan = make_plan(suite("+suite=paper", "suite.size=toy", root), str(sample_prefix))
    fix_plan(plan)
    written = (plan.folder / "plan.json").read_bytes()
    fix_plan(make_plan(suite("+suite=paper", "suite.size=toy", root, "suite.jobs=2"), str(sample_prefix)))
    assert (plan.folder / "plan.json").read_bytes() == written
    again = read_plan(plan.folder)
    assert again.runs == plan.runs and again.data == plan.data and again.lengths == [128, 256]
    longer = suite("+suite=paper", "suite.size=toy", root, "sizes.toy.steps=9")
    with pytest.raises(UserError, match=r"was fixed before the first run with steps of streaming_128_seed1 8 where it"):
        fix_plan(make_plan(longer, str(sample_prefix)))
    faster = suite("+suite=paper", "suite.size=toy", root, "suite.overrides=['optim.lr=1e-3']")
    with pytest.raises(UserError, match=re.escape("overrides of dense_128_seed1 [] where it is now ['optim.lr=1e-3']")):
        fix_plan(make_plan(faster, str(sample_prefix)))
    fewer = suite("+suite=paper", "suite.size=toy", root, "suite.seeds=[1]")
    with pytest.raises(UserError, match="seeds"):
        fix_plan(make_plan(fewer, str(sample_prefix)))
    other = json.loads(written) | {"data": "0" * 64}
    (plan.folder / "plan.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="data '0000"):
        fix_plan(plan)


@pytest.mark.parametrize("folder", ["a/b", "jürgen, it's (mine)", "a=b#c&d [1]", "back\\slash", "${oc.env:HOME}"])
def test_folders_reach_a_run_as_they_are(folder: str) -> None:
    assert data_overrides(None) == []
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        overrides = [*data_overrides(folder), f"run_root={quoted(folder)}"]
        config = to_config(compose("pretrain", overrides=overrides))
    assert config.data.prefixes == [folder] and config.run_root == folder


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "no suite is named: add one, such as +suite=paper."),
        (["+suite=paper", "suite.size=huge"], "suite.size=huge is unknown: choose one of cpu, gpu_small, gpu, toy."),
        (["+suite=paper", "suite.reference=full"], "suite.reference=full is not a row"),
        (["+suite=paper", "suite.lengths=[3000]"], "3000 tokens do not divide the 8192 tokens of a step"),
        (["+suite=paper", "suite.seeds=[]"], "suite.seeds is empty"),
        (["+suite=paper", "suite.seeds=[1,1]"], "names one twice"),
        (["+suite=paper", "suite.only.seeds=[7]"], "suite.only.seeds names [7]; the suite has [1, 2, 3]."),
        (["+suite=paper", "suite.only.rows=[sap]"], "suite.only.rows names ['sap']"),
        (["+suite=paper", "suite.do=[sleep]"], "suite.do=sleep is unknown"),
        (["+suite=paper", "suite.tokenizer=t.json"], "suite.tokenizer=t.json is for suite.text, which is empty."),
        (["+suite=paper", "suite.overrides=['training.steps=4']"], "training.steps=4 is part of the plan: set it by"),
        (["+suite=paper", "suite.rows.sep=['seed=4']"], "seed=4 is part of the plan: set it by suite.seeds."),
        (["+suite=paper", "suite.size=toy", "sizes.toy.timing_turns=9"], "take 10 steps, and a run has 6"),
        (["+suite=paper", "suite.name=../x"], "'../x' is no name for a suite or a row"),
        (["+suite=paper", "suite.prefix=a", "suite.text=[b.txt]"], "suite.prefix=a is prepared data"),
    ],
)
def test_mistakes(overrides: list[str], sentence: str) -> None:
    with pytest.raises((UserError, ValueError), match=re.escape(sentence)):
        suite(*overrides)
