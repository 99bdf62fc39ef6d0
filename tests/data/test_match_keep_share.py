"""sepllm match keep-share prints overrides of a thinned run that shows as many keys."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from sepllm_train.config.load import config_folder, register_schema, to_config
from tests.support.command import program

run = program("match keep-share")


def test_overrides_are_of_a_run_with_as_many_keys(sample_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiers = "attention.separators=[{classes: [comma, period], horizon: 128}, {classes: newline, horizon: forever}]"
    data = ["data.sequence_length=512", f"data.cache={sample_cache}"]
    run(["--samples", "24", "+experiment=demo_sep", *data, tiers])
    *_, counted, found, overrides = capsys.readouterr().out.splitlines()
    configured, without, forever = (float(number) for number in re.findall(r"\d+\.\d+", counted))
    assert without < configured < forever
    share, shown = re.match(r"keep_share (\S+) is .* shows (\S+) ", found).groups()  # type: ignore[union-attr]
    assert float(share) == pytest.approx((configured - without) / (forever - without), abs=1e-3)
    assert float(shown) == pytest.approx(configured, rel=0.02)
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        attention = to_config(
            compose("pretrain", overrides=["+experiment=demo_sep", *shlex.split(overrides)])
        ).attention
    assert (attention.placement, attention.keep_share) == ("thinned", float(share))
    assert attention.separators == ["period", "comma", "newline"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["attention=tierss"], "did you mean tiers?"),
        (["attention.windw=3"], "did you mean attention.window?"),
        (["data=prefixes", "data.prefixes=[nowhere/text]"], "There is no dataset at"),
    ],
)
def test_mistake(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run([*words])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: ") and sentence in told and told.count("\n") == 1
