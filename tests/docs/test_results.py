"""results/: one folder per study, complete and readable, with figures as SVG only."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from sepllm_train.suite.export import RUNS, is_study, unpack
from sepllm_train.suite.plan import read_plan
from sepllm_train.suite.runner import finished
from tests.docs.markdown import REPOSITORY, links

RESULTS = REPOSITORY / "results"
STUDIES = sorted(path for path in RESULTS.iterdir() if path.is_dir())
PAGES = sorted(RESULTS.rglob("*.md"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_study_is_described(study: Path) -> None:
    text = (study / "README.md").read_text(encoding="utf8")
    for heading in ("Question", "Commit", "Machine"):
        assert re.search(rf"^{heading}: \S", text, re.MULTILINE), f"{study.name}/README.md has no {heading}"
    assert "```bash\n" in text and f"{study.name}/README.md" in links(RESULTS / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(RESULTS)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in links(page) if "://" not in link and not (page.parent / link.split("#")[0]).exists()]
    assert not missing


def test_figures_are_svg() -> None:
    assert not [path for path in RESULTS.rglob("*") if path.suffix in (".png", ".jpg", ".pdf", ".html")]


def test_figures_are_shown_or_named_by_a_page() -> None:
    """Others are drawn again by `suite.figures`, and are not kept."""
    named = {
        (page.parent / link).resolve() for page in [*PAGES, *(REPOSITORY / "docs").glob("*.md")] for link in links(page)
    }
    described = {
        path for study in STUDIES for path in study.glob("*.svg") if path.name in (study / "README.md").read_text()
    }
    assert set(RESULTS.rglob("*.svg")) <= named | described


@pytest.mark.parametrize("file", sorted(RESULTS.rglob(RUNS)), ids=lambda file: file.parent.name)
def test_runs_are_readable_and_finished(file: Path, tmp_path: Path) -> None:
    runs = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert len({run["name"] for run in runs}) == len(runs) > 0
    assert all(run["metrics"][-1]["step"] == run["run"]["steps"] == run["config"]["training"]["steps"] for run in runs)
    if is_study(file.parent) and "plan" in json.loads((file.parent / "summary.json").read_text()):
        unpack(file.parent, tmp_path)
        plan = read_plan(tmp_path)
        assert {run.name for run in plan.runs if finished(plan, run)} == {run["name"] for run in runs}
