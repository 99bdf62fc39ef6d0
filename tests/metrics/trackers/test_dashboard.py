"""The dashboard shows what runs log, under the names they log it; sepllm dashboard tells what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.metrics.wandb_tracker import AXES
from sepllm_train.watch.workspace import LAYERS
from tests.compare.run_records import evaluation
from tests.metrics.trackers.conftest import Tracked
from tests.metrics.trackers.wandb_file import read
from tests.support.command import command

main = command("dashboard")

pytest.importorskip("wandb_workspaces", reason="the extra wandb is not installed")


def dry_run(file: Path, *arguments: str) -> dict[str, Any]:
    """The workspace that sepllm dashboard writes."""
    assert main(["--entity", "me", *arguments, "--dry-run", str(file)]) == 0
    return json.loads(file.read_text())


def panels(view: dict[str, Any]) -> list[dict[str, Any]]:
    """Configuration of every panel."""
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"]]


@pytest.mark.distributed
def test_panels_show_what_a_run_logs(tracked: Tracked, tmp_path: Path) -> None:
    logged = {key for row in read(tracked.root / "wandb").history for key in row}
    shown = panels(dry_run(tmp_path / "view.json"))
    # Of a run that is evaluated.
    scores = {key for key in evaluation(1, 0.5) if key.startswith("eval/")}
    for panel in shown:
        assert panel["xAxis"] in logged and panel["xAxis"] in AXES
        assert set(panel["metrics"]) <= logged
        if not panel["metrics"]:
            found = {key for key in logged | scores if re.fullmatch(panel["metricRegex"], key)}
            assert found and not found & {"eval/piqa/acc_stderr", "eval/seconds"}, panel
    layers = {key for key in logged if re.fullmatch(LAYERS, key)}
    assert layers == {f"train/layer_{number:02d}/attended_share" for number in range(3)}
    for loss in ("val/loss", "train/loss"):
        assert [panel["xAxis"] for panel in shown if panel["metrics"] == [loss]] == list(AXES)
    assert list(AXES)[:3] == ["flops/model", "flops/dense", "flops/paper"]


@pytest.mark.distributed
def test_every_training_metric_has_a_panel(tracked: Tracked, tmp_path: Path) -> None:
    logged = {key for row in read(tracked.root / "wandb").history for key in row if key.startswith("train/")}
    shown = panels(dry_run(tmp_path / "view.json"))
    named = {key for panel in shown for key in panel["metrics"]}
    matched = {key for key in logged for p in shown if "metricRegex" in p and re.fullmatch(p["metricRegex"], key)}
    # Rare events and the number of a rank, which no curve tells anything about.
    assert logged - named - matched == {"train/lost_workers", "train/straggler_rank"}


def test_groups(tmp_path: Path) -> None:
    """One group: a line for each of its runs. Several, or all: a line for each group."""
    cases: list[tuple[tuple[str, ...], bool]] = [((), True), (("one",), False), (("one", "two"), True)]
    for groups, grouped in cases:
        arguments = ("--group", *groups) if groups else ()
        view = dry_run(tmp_path / "view.json", *arguments)
        (runs,) = view["spec"]["section"]["runSets"]
        assert [key["name"] for key in runs["grouping"]] == ["group"] * grouped
        asked = [entry["value"] for entry in runs["filters"]["filters"] if entry["key"]["name"] == "group"]
        assert asked == ([list(groups)] if groups else [])
        assert (view["entity"], view["project"]) == ("me", "sepllm-train")
        assert view["displayName"] == (" and ".join(groups) or "sepllm-train")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is no API key for api.wandb.ai: run `wandb login`"),
        (["--dry-run", "/proc/none/view.json"], "Cannot write /proc/none/view.json"),
        (["--name", "\N{ROCKET}"], "W&B takes no such workspace"),
    ],
)
def test_mistake(no_account: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert main(["--entity", "me", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {sentence}") and told.count("\n") == 1
