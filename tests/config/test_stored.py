"""config.yaml of a run: reads back as it was, is never interpolated, and is bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sepllm_train.base.errors import UserError
from sepllm_train.config.load import config_folder, configuration_of
from sepllm_train.config.schema import AttentionConfig, Config, LoggingConfig
from sepllm_train.config.stored import read_config, to_yaml
from sepllm_train.runs.open import Checkpoint
from sepllm_train.runs.variations import base_attention


def stored(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf8")
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml")))
def test_what_is_written_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    config = configuration_of([f"+experiment={name}"])
    text = to_yaml(config)
    assert text == OmegaConf.to_yaml(OmegaConf.structured(config)), "the format of earlier versions"
    assert read_config(stored(tmp_path, text)) == config


@pytest.mark.parametrize(
    "text",
    [
        "2024_01_15", "3.10", "1e3", "on", "y", "null", "~", "0x10", "0o17", "1:30", "2024-01-01", "nan", ".inf", "ü",
        "a: b", "- x", "#x", "<<", "=", "a\nb", " a", "'", '"', "${oc.env:HOME}", "${", "!!str x", "&a", "*a", "%", "|",
    ],
)  # fmt: skip
def test_text_is_read_as_it_was(text: str, tmp_path: Path) -> None:
    config = Config(name=text, logging=LoggingConfig(tags=[text], entity=text))
    assert read_config(stored(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("text", ["2024_01_15", "3.10", "1e3", "on", "0x10", "007", "1_0", "yes"])
def test_text_without_quotes_stays_as_it_is_typed(text: str, tmp_path: Path) -> None:
    config = read_config(stored(tmp_path, f"name: {text}\nlogging: {{tags: [{text}, x], entity: {text}}}\n"))
    assert config.name == config.logging.entity == text and config.logging.tags == [text, "x"]


@pytest.mark.parametrize("key", ["name: ", "model: {name: ", "logging: {tags: [", "data: {cache: "])
def test_interpolations_are_text(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "hunter2")
    close = {"{": "}", "[": "]"}
    ends = "".join(close[character] for character in reversed(key) if character in close)
    config = read_config(stored(tmp_path, f"{key}'${{oc.env:HIDDEN}}'{ends}\n"))
    assert "hunter2" not in repr(config) and "${oc.env:HIDDEN}" in repr(config)
    assert "hunter2" not in to_yaml(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x, x]\nb: [*a, *a]\n", "an alias"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("model: {layers: 100000000}", "model.layers=100000000 must be at most 10000."),
        ("model: {layers: 1e8}", "model.layers must be a whole number, not 100000000.0"),
        ("model: {layers: 99999999999999999999999}", "a number of 23 digits"),
        ("attention: {window: [" + "1," * 20_000 + "1]}", "attention.window must have at most 10,000 entries"),
        ("parallel: {pipeline: 1000000000}", "parallel.pipeline=1000000000 must be at most"),
        ("model: {depth: 3}", "there is no key model.depth"),
        ("models: 3", "there is no key models (did you mean model?)"),
        ("model: 3", "model must be a mapping of keys, not 3"),
        ("model: {bias: 1}", "model.bias must be true or false, not 1"),
        ("name: {a: b}", "name must be text, not {'a': 'b'}"),
        ("name: null", "name must be text, not None"),
        ("optim: {lr: .nan}", "optim.lr=nan must be a finite number"),
        ("optim: {lr: true}", "optim.lr must be a number, not True"),
        ("seed: -1", "seed=-1 must be"),
        ("logging: {tags: x}", "logging.tags must be a list, not 'x'"),
        ("1: 2", "there is no key 1"),
        ("[a]", "does not hold a YAML mapping"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = stored(tmp_path, text)
    with pytest.raises(UserError) as refused:
        read_config(path)
    told = str(refused.value)
    assert told.startswith(str(path)) and words in told and "\n" not in told and len(told) < 400


def test_attention_of_a_checkpoint_is_checked(tmp_path: Path) -> None:
    found = Checkpoint(tmp_path, {"identity": {"attention.window": 8, "model.layers": 2}})
    assert found.attention == AttentionConfig(window=8)
    for identity in ({"attention.windows": 8}, {"attention.initial_tokens": "3"}, {"attention.window": "many"}):
        with pytest.raises(UserError, match=r"attention\.(windows|initial_tokens|window)"):
            _ = Checkpoint(tmp_path, {"identity": identity}).attention


def test_values_of_an_option_are_typed_as_overrides_are() -> None:
    trained = AttentionConfig(pattern="sep")
    found = base_attention(trained, ["attention.window=[8,16]", "separators=[comma, period]", "full_layers=first"])
    assert (found.window, found.separators, found.full_layers) == ([8, 16], ["comma", "period"], "first")
    for override, words in (
        ("pattern=on", "attention.pattern=on is unknown"),
        ("placement=3.10", "attention.placement=3.10 is unknown"),
        ("interval=1.5", "attention.interval must be a whole number"),
        ("windows=3", "write KEY=VALUE with one of"),
        ("window=[8,", "cut off"),
        ("keep_share=${oc.env:HOME}", "keep_share"),
    ):
        with pytest.raises(UserError) as refused:
            base_attention(trained, [override])
        assert words in str(refused.value) and "\n" not in str(refused.value)
