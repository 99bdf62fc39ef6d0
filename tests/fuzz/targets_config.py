"""Mutated overrides of runs and suites, stored configurations, and KEY=VALUE of --attention."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

from sepllm_train.base.errors import UserError
from sepllm_train.config.keys import keys_of
from sepllm_train.config.load import configuration_of
from sepllm_train.config.overrides import settled
from sepllm_train.config.schema import AttentionConfig, Config
from sepllm_train.config.stored import read_config, to_yaml
from sepllm_train.config.validate import validate
from sepllm_train.runs.variations import base_attention
from sepllm_train.suite.config import SuiteSettings

KEYS = [key.name for key in keys_of(Config)]
SUITE_KEYS = [key.name for key in keys_of(SuiteSettings)]
GROUPS = ["model", "attention", "optim", "data", "parallel", "logging", "+experiment", "training", "hydra", "suite"]
FILES = [
    "pythia14m",
    "sep",
    "dense",
    "cosine",
    "prefixes",
    "single",
    "demo_sep",
    "demo_dense",
    "nothing",
    "../pretrain",
]
SCALARS = [
    "", "0", "1", "-1", "2", "64", "1e3", "1e308", "-1e999", "nan", "inf", "9" * 30, "1.5", "0x10", "007",
    "1_000", "true", "off", "null", "~", "None", "a", "ü", "日本", "\u202e", "\x00", "\n", "a b", " a ",
    "a=b", "a:b", "a,b", "#", "$", "%s", "\\", "\\'", "'", '"', "'a'", '"a"', "'a", "[", "]", "{", "}", "(",
    ")", "[]", "{}", "()", "[a,b]", "[1,[2,[3]]]", "{a: b}", "{path: a, weight: 2}", "[{path: 3.10}]",
    "[{classes: [comma], horizon: 5}]", "[{length: 64, steps: 2}]", "${model.name}", "${name}",
    "${oc.env:HOME}", "${oc.env:NOPE,x}", "${now:%Y}", "${", "${}", "${a", "\\${x}", "${x:y}", "${${name}}",
    "${oc.decode:'{'}", "${oc.create:{a:1}}", "${model}", "${hydra:job.name}", "???", "!!python/object:x",
    "*a", "&a b", "<<", "sep", "paper", "all", "auto", "first", "none", "thinned", "fixed", "sum(1,2)",
    "choice(1,2)", "range(1,9)", "glob(*)", "shuffle(1,2)", "[" * 40, "{a:" * 40, "x" * 300, "1,2,3", "~x",
    "+x", "--x", "@x", "a@b",
]  # fmt: skip
SIGNS = ["", "", "", "", "+", "++", "~", "--", "-", "+~", " "]
BASE = to_yaml(Config())


def _key(draw: random.Random, keys: list[str]) -> str:
    kind = draw.random()
    if kind < 0.6:
        return draw.choice(keys)
    if kind < 0.8:
        return draw.choice(GROUPS)
    return _mutated(draw, draw.choice(keys))


def _value(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.6:
        return draw.choice(SCALARS)
    if kind < 0.75:
        return draw.choice(FILES)
    if kind < 0.9:
        return f"[{','.join(draw.choice(SCALARS) for _ in range(draw.randrange(4)))}]"
    return "".join(draw.choice(SCALARS) for _ in range(draw.randrange(1, 4)))


def _word(draw: random.Random, keys: list[str]) -> str:
    kind = draw.random()
    if kind < 0.05:
        return draw.choice(SCALARS)
    word = f"{draw.choice(SIGNS)}{_key(draw, keys)}={_value(draw)}"
    return _mutated(draw, word) if kind > 0.8 else word


def _mutated(draw: random.Random, text: str) -> str:
    """`text` with pieces taken out, doubled or put in."""
    for _ in range(draw.randrange(1, 4)):
        begin = draw.randrange(len(text) + 1)
        end = min(len(text), begin + draw.randrange(8))
        piece = draw.choice(["", text[begin:end] * 2, draw.choice(SCALARS), chr(draw.randrange(1, 0x2FFF))])
        text = text[:begin] + piece + text[end:]
    return text


def overrides(draw: random.Random, folder: Path) -> None:
    """Compose a run from random overrides; one that composes passes through config.yaml unchanged."""
    words = [_word(draw, KEYS) for _ in range(draw.randrange(1, 4))]
    try:
        config = configuration_of(words)
    except UserError as error:
        assert "\n" not in str(error), words
        return
    _round_trip(config, folder)


def suite_words(draw: random.Random, folder: Path) -> None:
    """Read the words of a suite's command line."""
    try:
        settled([_word(draw, SUITE_KEYS) for _ in range(draw.randrange(1, 4))], SuiteSettings)
    except UserError as error:
        assert "\n" not in str(error)


def stored(draw: random.Random, folder: Path) -> None:
    """Read a damaged config.yaml."""
    text = BASE
    for _ in range(draw.randrange(1, 4)):
        lines = text.splitlines()
        place = draw.randrange(len(lines))
        key = lines[place].partition(":")[0]
        lines[place] = draw.choice([f"{key}: {_value(draw)}", _mutated(draw, lines[place]), lines[place] * 2, "  " * 9])
        text = "\n".join(lines) if draw.random() < 0.8 else _mutated(draw, text)
    path = folder / "config.yaml"
    path.write_bytes(text.encode("utf8", "surrogatepass") if draw.random() < 0.97 else draw.randbytes(200))
    try:
        config = read_config(path)
    except UserError:
        return
    _round_trip(config, folder)


def attention_option(draw: random.Random, folder: Path) -> None:
    """Read KEY=VALUE of --attention."""
    keys = [key.name for key in keys_of(AttentionConfig)]
    with contextlib.suppress(UserError):
        base_attention(AttentionConfig(), [_word(draw, keys) for _ in range(draw.randrange(1, 3))])


def _round_trip(config: Config, folder: Path) -> None:
    """What composes is written, read back as the same, and checked."""
    path = folder / "written.yaml"
    path.write_text(to_yaml(config), encoding="utf8")
    again = read_config(path)
    assert again == config or config != config, "config.yaml reads back as another configuration"
    with contextlib.suppress(UserError):
        validate(config, 1)


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "overrides": overrides,
    "suite_words": suite_words,
    "stored_config": stored,
    "attention_option": attention_option,
}
