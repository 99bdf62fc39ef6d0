"""The plan of a suite: what is run, and that it cannot change once it is fixed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sepllm_train.base.errors import UserError
from sepllm_train.config.load import config_folder, register_schema, to_config, to_dataclasses
from sepllm_train.config.overrides import literal, settled
from sepllm_train.config.validate import validate
from sepllm_train.suite.config import SuiteSettings
from sepllm_train.suite.main import run_suite
from sepllm_train.suite.plan import data_overrides, fix_plan, make_plan, read_plan

SUITES = sorted(path.stem for path in (config_folder() / "suite").glob("*.yaml"))
SIZES = ("cpu", "gpu", "toy")


def suite(*overrides: str) -> SuiteSettings:
    """The configuration of a suite's command line."""
    register_schema("suite_schema", SuiteSettings)
    words = settled(overrides, SuiteSettings)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return to_dataclasses(compose("suite", overrides=words), SuiteSettings)


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("size", SIZES)
def test_every_run_of_every_suite_is_a_sound_configuration(name: str, size: str) -> None:
    lengths = ["suite.lengths=null"] if size == "toy" else []
    config = suite(f"+suite={name}", f"suite.size={size}", *lengths)
    plan = make_plan(config, None)
    assert len(plan.runs) == len(config.variants) * len(config.lengths) * len(config.seeds)
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for run in (run for run in plan.runs if run.seed == config.seeds[0]):
            composed = to_config(compose("pretrain", overrides=[*run.overrides, f"name={run.name}"]))
            validate(composed, world_size=plan.processes)
            assert composed.seed == run.seed and composed.data.sequence_length == run.length
            assert composed.training.steps == run.steps
            assert composed.training.global_batch * run.length == config.size.tokens_per_step


def test_variants_differ_in_attention_and_length_of_the_run_only() -> None:
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


def test_a_variant_keeps_its_own_keys_and_gets_those_of_the_size() -> None:
    config = suite("+suite=paper", "suite.size=toy", "suite.overrides=['attention.initial_tokens=1']")
    register_schema()
    runs = {run.variant: run for run in make_plan(config, None).runs}
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        sep, wide = (to_config(compose("pretrain", overrides=runs[name].overrides)) for name in ("sep", "sep_n128"))
    assert sep.attention.window == 16, "the size's key survives the variant's choice of a group"
    assert wide.attention.window == 128, "the variant's own key comes last"
    assert sep.attention.initial_tokens == wide.attention.initial_tokens == 1


def test_seeds_are_the_outer_loop_so_that_a_part_is_a_whole_comparison() -> None:
    plan = make_plan(suite("+suite=paper"), None)
    assert [run.seed for run in plan.runs] == sorted(run.seed for run in plan.runs)
    config = suite(
        "+suite=paper", "suite.only.seeds=[2]", "suite.only.variants=[sep,dense]", "suite.only.lengths=[8192]"
    )
    assert [run.name for run in plan.selected(config.suite.only)] == ["dense_8192_seed2", "sep_8192_seed2"]


def test_learning_rates_make_a_variant_of_each_pattern_and_rate() -> None:
    config = suite("+suite=learning_rate", "suite.size=toy", "suite.lengths=[128]")
    names = [f"{pattern}_lr{rate}" for pattern in ("dense", "sep") for rate in ("0.001", "0.004", "0.016")]
    assert list(config.variants) == names and config.reference == "dense_lr0.004"
    plan = make_plan(config, None)
    assert {run.steps for run in plan.runs} == {config.size.steps}, "losses at equal tokens"
    run = next(run for run in plan.runs if run.variant == "sep_lr0.016")
    assert run.overrides[-2:] == ["optim.lr=0.016", "optim.min_lr=0.0016"]
    only = suite("+suite=learning_rate", "suite.size=cpu", "~suite.variants.sep", "suite.learning_rates=[1e-4,3e-3]")
    assert list(only.variants) == ["dense_lr0.0001", "dense_lr0.003"]
    chosen = suite(
        "+suite=paper", "suite.same_steps=true", "suite.learning_rates=[1e-3]", "suite.only.variants=[sep_lr0.001]"
    )
    assert [run.variant for run in make_plan(chosen, None).selected(chosen.suite.only)] == ["sep_lr0.001"] * 6


def test_older_names_are_still_read() -> None:
    config = suite(
        "+suite=paper", "suite.only.rows=[dense]", "sizes.cpu.timing_turns=3", "+suite.rows.own=['model=pythia31m']"
    )
    assert config.suite.only.variants == ["dense"] and config.size.timing_rounds == 3
    assert config.variants["own"] == ["model=pythia31m"] and config.variants["dense"] == ["attention=dense"]


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
        overrides = [*data_overrides(folder), f"run_root={literal(folder)}"]
        config = to_config(compose("pretrain", overrides=overrides))
    assert config.data.prefixes == [folder] and config.run_root == folder


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "no suite is named: add one, such as +suite=paper."),
        (["+suite=paper", "suite.size=huge"], "suite.size=huge is unknown: choose one of cpu, gpu_small, gpu, toy."),
        (["+suite=paper", "suite.reference=full"], "suite.reference=full is not a variant"),
        (["+suite=paper", "suite.lengths=[3000]"], "3000 tokens do not divide the 8192 tokens of a step"),
        (["+suite=paper", "suite.seeds=[]"], "suite.seeds is empty"),
        (["+suite=paper", "suite.seeds=[1,1]"], "names one twice"),
        (["+suite=paper", "suite.only.seeds=[7]"], "suite.only.seeds names [7]; the suite has [1, 2, 3]."),
        (["+suite=paper", "suite.only.variants=[sap]"], "suite.only.variants names ['sap']"),
        (["+suite=paper", "suite.do=[sleep]"], "suite.do=sleep is unknown"),
        (["+suite=paper", "suite.tokenizer=t.json"], "suite.tokenizer=t.json is for suite.text, which is empty."),
        (["+suite=paper", "suite.overrides=['training.steps=4']"], "training.steps=4 is part of the plan: set it by"),
        (["+suite=paper", "suite.variants.sep=['seed=4']"], "seed=4 is part of the plan: set it by suite.seeds."),
        (["+suite=paper", "suite.size=toy", "sizes.toy.timing_rounds=9"], "take 10 steps, and a run has 6"),
        (["+suite=paper", "suite.name=../x"], "'../x' is no name for a suite or a variant"),
        (["+suite=paper", "suite.learning_rates=[1e-3]"], "are compared at equal tokens: set suite.same_steps."),
        (["+suite=learning_rate", "suite.learning_rates=[1e-3,1e-3]"], "suite.learning_rates=[0.001, 0.001] names one"),
        (["+suite=paper", "suite.prefix=a", "suite.text=[b.txt]"], "suite.prefix=a is prepared data"),
    ],
)
def test_mistakes(overrides: list[str], sentence: str) -> None:
    with pytest.raises((UserError, ValueError), match=re.escape(sentence)):
        suite(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["suite.overrides=[+training.stepz=3]"], "there is no key training.stepz (did you mean training.steps?)"),
        (["suite.overrides=[training.stepz=3]"], "there is no key training.stepz"),
        (["suite.overrides=[++foo=1]"], "there is no key foo"),
        (["sizes.toy.overrides=[+foo=1]"], "there is no key foo"),
        (["suite.overrides=[model.heads=7]"], "model.heads=7"),
        (["suite.overrides=[optim.warmup_steps=1000]"], "optim.warmup_steps=1000 must lie between"),
        (["suite.overrides=[attention.window=[4,4,4]]"], "3 windows for a model of 2 layers"),
        (["suite.variants.sep=[attention=sap]"], "sep_128_seed1 of the suite would be refused"),
        (["suite.variants.sep=['attention.separators=[dot]']"], "unknown separator class 'dot'"),
        (["+suite.variants.own=['+training.stepz=1']"], "own_128_seed1 of the suite would be refused"),
        (["suite.overrides=['data.validation_prefixes=[nowhere]']"], "There is no dataset at"),
        (["suite.overrides=['model.name=\\${oc.env:HOME}']"], "${oc.env:HOME}"),
        (["suite.overrides=['hello']"], "hello is no KEY=VALUE"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_run_that_would_be_refused_ends_the_suite_before_it_begins(
    dry: bool, overrides: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepllm_train.suite.main.prepare_data", lambda *_: pytest.fail("the suite began"))
    with pytest.raises(UserError) as refused:
        run_suite(suite("+suite=paper", "suite.size=toy", f"suite.root={tmp_path}", f"suite.dry_run={dry}", *overrides))
    assert words in str(refused.value) and not list(tmp_path.iterdir())


def test_secrets_in_overrides_are_in_no_plan_and_no_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "suite.overrides=['logging.entity=https://me:hunter2@host']"
    root = f"suite.root={tmp_path}"
    run_suite(suite("+suite=paper", "suite.size=toy", root, "suite.dry_run=true", secret))
    printed = capsys.readouterr().out
    assert "hunter2" not in printed and "logging.entity=https://me:***@host" in printed
    plan = make_plan(suite("+suite=paper", "suite.size=toy", root, secret), None)
    fix_plan(plan)
    assert "hunter2" not in (plan.folder / "plan.json").read_text()
    fix_plan(plan)
