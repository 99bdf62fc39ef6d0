"""What the README and docs/ tell people to type and to set exists, and their tables are what the code says."""

from __future__ import annotations

import argparse
import dataclasses
import re
import runpy
import sys
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from sep_attention.op import MASKED_UP_TO
from torch.distributed.run import get_args_parser

from data_prep.separators import CLASSES
from sepllm_train.base import errors
from sepllm_train.cli.main import main
from sepllm_train.cli.old import NEW
from sepllm_train.cli.pretrain import parser as pretrain_parser
from sepllm_train.config.load import config_folder, register_schema, to_config, to_dataclasses
from sepllm_train.config.schema import AttentionConfig, Config
from sepllm_train.config.validate import validate
from sepllm_train.metrics.flops import CONVENTIONS, FlopsCounter, shape_of
from sepllm_train.model.pattern import AUTO, resolve_pattern
from sepllm_train.suite import config as suites
from sepllm_train.suite.plan import make_plan
from sepllm_train.training.clock import PARTS
from tests.docs.markdown import PAGES, REPOSITORY, Command, commands, links, prose, spans, table

# How the environment is made and entered.
ACTIVATION = (("python3", "-m", "venv", ".venv"), ("source", ".venv/bin/activate"))
CONFIGURATION = REPOSITORY / "docs" / "configuration.md"
GROUPS = {name: set(keys) for name, keys in dataclasses.asdict(Config()).items() if isinstance(keys, dict)}
ENTRY_POINTS = set(re.findall(r'"([\w-]+)=sepllm_train', (REPOSITORY / "setup.py").read_text()))


class Parsed(Exception):
    """A program has understood its arguments."""


def load(*overrides: str) -> Config:
    """The checked configuration of a command line."""
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return to_config(compose("pretrain", overrides=list(overrides)))


def check_pretraining(overrides: list[str], world_size: int | None) -> None:
    """Everything that a run checks before it opens its data. `world_size` None: the smallest launch that fits."""
    shows_only = overrides[-2:] == ["--cfg", "job"]
    config = load(*(overrides[:-2] if shows_only else overrides))
    validate(config, world_size or config.parallel.tensor * config.parallel.pipeline)
    if config.attention.separators != AUTO:  # that one is resolved from data
        resolve_pattern(config.attention, config.model.layers)


def check_suite(overrides: list[str]) -> None:
    """What a suite checks before it opens its data."""
    register_schema("suite_schema", suites.SuiteSettings)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = to_dataclasses(compose("suite", overrides=overrides), suites.SuiteSettings)
    assert make_plan(config, None).selected(config.suite.only)


def check_torchrun(words: list[str]) -> None:
    """torchrun's own options, then the script for as many processes as they start."""
    launch = get_args_parser().parse_args(words)
    assert launch.training_script == "scripts/pretrain.py" and (REPOSITORY / launch.training_script).is_file()
    world_size = int(launch.nnodes.split(":")[-1]) * int(launch.nproc_per_node)
    check_pretraining(launch.training_script_args, world_size)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of sepllm up to the point where its parser has accepted the words."""
    stop_after_parsing(monkeypatch)
    with pytest.raises(Parsed):
        main(words)


def check_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script, or a module after -m, up to the point where its own parser has accepted the words."""
    stop_after_parsing(monkeypatch)
    if words[0] == "-m":
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(Parsed):
            runpy.run_module(words[1], run_name="__main__")
        return
    path = REPOSITORY / words[0]
    assert path.is_file()
    monkeypatch.setattr(sys, "argv", words)
    # Scripts find their neighbours as when Python runs them.
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let argparse raise Parsed for what it accepts."""

    def stopping_after(parse: Callable[..., Any]) -> Callable[..., None]:
        def stop(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
            parse(parser, *arguments, **options)
            raise Parsed

        return stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping_after(getattr(argparse.ArgumentParser, name)))


def check_sbatch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of scripts/slurm: the world of its nodes and GPUs, and what its arguments train, or tokenize."""
    (script,) = (word for word in words if word.endswith(".sbatch"))
    assert (REPOSITORY / script).is_file()
    before, after = words[: words.index(script)], words[words.index(script) + 1 :]
    options = dict(word.removeprefix("--").split("=") for word in before)
    if script.endswith("tokenize.sbatch"):
        assert options.keys() <= {"array", "cpus-per-task", "dependency"}
        check_command(["prepare", *(["tokenize"] if "array" in options else []), *after], monkeypatch)
        return
    assert options.keys() <= {"nodes", "gpus-per-node", "time", "array"}
    world_size = int(options.get("nodes", 1)) * int(options["gpus-per-node"])
    runs = [after]
    if script.endswith("sweep.sbatch"):
        named = list(takewhile(lambda word: word != "--", after))
        assert options["array"] == f"1-{len(named)}"
        runs = [[f"+experiment={name}", *after[len(named) + 1 :]] for name in named]
    for overrides in runs:
        check_pretraining(overrides, world_size)


def check_make(words: list[str]) -> None:
    """Targets and variables of the Makefile."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for word in words:
        name = word.split("=")[0]
        pattern = rf"^{name} \?=|\$\({name}\)" if "=" in word else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {word}"


def check_pip(words: list[str]) -> None:
    """Installing this project: the extras that are named exist."""
    assert words[0] == "install" and words[-2] == "-e"
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
    assert extras is not None
    provided = metadata.metadata("sepllm-train").get_all("Provides-Extra")
    assert provided and set((extras[1] or "").split(",")) - {""} <= set(provided)


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command_is_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = command.words
    if program == "make":
        check_make(words)
    elif program == "torchrun":
        check_torchrun(words)
    elif program == "sbatch":
        check_sbatch(words, monkeypatch)
    elif program == "python" and words[0] == "scripts/pretrain.py":
        check_pretraining(words[1:], world_size=None)
    elif program == "sepllm" and words[0] == "pretrain":
        options, overrides = pretrain_parser().parse_known_args(words[1:])
        if options.keys is None and not options.help:
            check_pretraining(overrides, options.nproc * options.nnodes if options.nproc > 1 else None)
    elif program == "sepllm" and words[0] == "suite":
        check_suite(words[1:])
    elif program == "sepllm":
        check_command(words, monkeypatch)
    elif program in ("python", ".venv-kvpress/bin/python"):
        check_program(words, monkeypatch)
    elif program == ".venv/bin/python" and words[:2] == ["-m", "pip"]:
        check_pip(words[2:])
    else:
        assert command.words in ACTIVATION, f"no check for {command}"


def test_the_commands_that_must_be_there() -> None:
    shown = {" ".join(command.words) for command in commands() if command.page in ("README.md", "data.md")}
    assert {"make demo", "make test"} <= shown
    assert {word.split()[2] for word in shown if word.startswith("sepllm prepare")} == {
        "train-tokenizer", "tokenize", "merge", "annotate", "stats", "verify",
    }  # fmt: skip


def anchors(page: Path) -> set[str]:
    """What a link may name of a page: its headings in small letters, without punctuation, with - for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def ignored_folders() -> set[str]:
    """Folders at the top of the checkout that git ignores."""
    lines = (REPOSITORY / ".gitignore").read_text().splitlines()
    return {line.strip("/") for line in lines if line.startswith("/") and line.endswith("/")}


def test_what_commands_write_is_ignored_by_git() -> None:
    """Otherwise a checkout in use never looks clean."""
    written = {value for one in commands() for flag, value in pairwise(one.words) if flag == "--output"}
    written |= {one.words[-1] for one in commands() if one.words[:2] == ("sepllm", "export")}
    folders = {path.split("/")[0] for path in written if "/" in path}
    assert {"models", "data", "runs"} <= folders <= ignored_folders()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"
    top = {path.name for path in REPOSITORY.iterdir() if path.is_dir()} - ignored_folders()
    for span in spans(page):
        if re.fullmatch(r"[\w.]+(/[\w.*-]*)+", span) and span.split("/")[0] in top:
            assert list(REPOSITORY.glob(span.rstrip("/"))), f"{page.name} names {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_choices_exist(page: Path) -> None:
    """`group.key`, `group=choice` and the names of experiments in code spans."""
    experiments = {path.stem for path in (config_folder() / "experiment").glob("*.yaml")}
    for span in spans(page):
        if key := re.match(rf"'?({'|'.join(GROUPS)})\.(?!py$)(\w+)(?==|$)", span):
            assert key[2] in GROUPS[key[1]], f"{page.name}: there is no {span}"
        if choice := re.fullmatch(rf"({'|'.join(GROUPS)})=(\S+)", span):
            assert (config_folder() / choice[1] / f"{choice[2]}.yaml").is_file(), f"{page.name}: there is no {span}"
        if re.match(r"(demo|pythia[\d.]+[mb])_(?!\w+/)", span):
            assert span in experiments, f"{page.name}: there is no experiment {span}"


def test_every_experiment_is_documented() -> None:
    assert {path.stem for path in (config_folder() / "experiment").glob("*.yaml")} <= set(spans(CONFIGURATION))


def test_attention_table_holds_every_key() -> None:
    rows = table("docs/configuration.md", "key")
    keys = [f"`attention.{field.name}`" for field in dataclasses.fields(AttentionConfig)]
    assert [row[0] for row in rows] == keys
    for row in rows:
        for value in re.findall(r"`(\w+)`", row[1]):
            setting = {row[0].strip("`").removeprefix("attention."): yaml.safe_load(value)}
            given = AttentionConfig(**{"interval": 8, "keep_share": 0.5 if value == "thinned" else None, **setting})
            if value != AUTO:
                resolve_pattern(given, 12)


@pytest.mark.parametrize(
    "override",
    [
        "attention.full_layers=[0,5,11]",
        "attention.separators=[period,question]",
        "attention.separators=[{classes: [comma], horizon: 512}, {classes: [period], horizon: forever}]",
    ],
)
def test_lists_can_be_typed(override: str) -> None:
    resolve_pattern(load(override).attention, 12)


def test_separator_classes_are_those_of_the_code() -> None:
    rows = table("docs/data.md", "number")
    assert rows == [[str(entry.number), f"`{entry.name}`", entry.description] for entry in CLASSES]


def test_metrics_table_is_what_the_loop_writes() -> None:
    source = "".join(
        (REPOSITORY / "sepllm_train" / "training" / name).read_text()
        for name in ("step_logger.py", "validator.py", "evaluator.py", "loop.py", "clock.py")
    )
    written = set(re.findall(r'"((?:train|val|eval|checkpoint)/[\w/]+)"', source))
    written |= {f"train/{part}_seconds" for part in PARTS} | {f"val/{key}" for key in ("loss", "bits_per_byte")}
    told = {key for row in table("docs/running.md", "key") for key in re.findall(r"`([\w/]+)`", row[0])}
    scores = {"eval/TASK/METRIC", "eval/TASK/METRIC_stderr"}
    assert told == written | scores | {"val/NAME/loss", "val/NAME/bits_per_byte", "train/layer_NN/attended_share"}


def test_conventions_are_those_of_the_code() -> None:
    assert [row[0] for row in table("docs/flops.md", "key")] == [f"`flops/{name}`" for name in CONVENTIONS]


def test_flops_table_is_what_the_counter_gives() -> None:
    length, model = 2048, load("model=pythia160m").model
    shape, headless = shape_of(model, 50304), shape_of(model, 0)
    rows = table("docs/flops.md", "pattern")
    assert len(rows) == 5
    for _, share, *told in rows:
        pairs = round(float(share.rstrip("%")) / 100 * FlopsCounter(shape, length).causal_pairs(length))
        ratios = []
        for key, counted in (("flops/paper", shape), ("flops/model", shape), ("flops/model", headless)):
            dense = FlopsCounter(counted, length, dense=True)
            whole = dense.training(length, dense.causal_pairs(length))[key]
            ratios.append(FlopsCounter(counted, length).training(length, pairs)[key] / whole)
        assert told == [f"{ratio:.1%}" for ratio in ratios]


def test_flops_floor_is_what_the_counter_gives() -> None:
    text = " ".join(prose(REPOSITORY / "docs" / "flops.md").split())
    shape = shape_of(load("model=pythia160m").model, 50304)
    for length, words in ((4096, "{} of the dense FLOPs at S = 4096"), (8192, "{} at 8192"), (32768, "{} at 32,768")):
        counter = FlopsCounter(shape, length)
        flops = counter.training(length, 0)
        assert words.format(f"{flops['flops/model'] / flops['flops/dense']:.1%}") in text


def test_exit_codes_are_those_of_the_code() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(row[0]) for row in table("docs/faults.md", "code")} == codes | {0}


def test_variables_of_the_slurm_scripts_are_told() -> None:
    used = set(re.findall(r"SEPLLM_\w+", (REPOSITORY / "scripts" / "slurm" / "pretrain.sbatch").read_text()))
    rows = table("docs/running.md", "variable of `scripts/slurm/pretrain.sbatch`")
    assert {row[0].strip("`") for row in rows} == used


def test_console_entry_points_are_named() -> None:
    assert ENTRY_POINTS - set(NEW) == {"sepllm"} <= set(spans(PAGES[0]))


def test_limits_and_bars_are_those_of_the_code() -> None:
    assert f"wins on CPU up to {MASKED_UP_TO} tokens" in prose(REPOSITORY / "docs" / "attention.md")
    assert f"Up to {MASKED_UP_TO} tokens" in prose(REPOSITORY / "docs" / "performance.md")
    bars = runpy.run_path(str(REPOSITORY / "benchmarks" / "attention" / "cpu.py"))["BARS"]
    assert [row[:2] for row in table("docs/performance.md", "S")] == [[str(s), f"{bar}x"] for s, bar in bars.items()]
