"""The files of a comparison: page, figures, and how they are written."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sepllm_train.metrics.flops import CONVENTIONS
from tests.compare.run_records import validation
from tests.support.command import command

main = command("compare")

FIGURES = ("loss_vs_flops", "loss_vs_seconds", "loss_vs_tokens")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def output(dense: Path, sep: Path, tmp_path: Path) -> Path:
    """Folder of a finished comparison."""
    assert main([str(dense), str(sep), "--output", str(tmp_path / "a" / "b"), "--title", "Dense & <sep>"]) == 0
    return tmp_path / "a" / "b"


def test_the_files(output: Path) -> None:
    figures = {f"{name}.svg" for name in FIGURES}
    assert {path.name for path in output.iterdir()} == figures | {
        "curves.csv",
        "comparison.json",
        "comparison.md",
        "comparison.html",
    }


def test_a_folder_of_runs_stands_for_the_runs_in_it(
    output: Path, dense: Path, sep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    assert dense.parent == sep.parent == tmp_path
    assert main([str(tmp_path), "--output", str(tmp_path / "whole"), "--title", "Dense & <sep>"]) == 0
    assert f"{tmp_path} holds 2 runs: dense, sep" in " ".join(capsys.readouterr().err.split())
    for name in ("curves.csv", "comparison.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (output / name).read_bytes()


@pytest.mark.parametrize("name", FIGURES)
def test_svg_text_is_text_and_says_the_convention(output: Path, name: str) -> None:
    root = ET.parse(output / f"{name}.svg").getroot()
    texts = ["".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")]
    assert {"dense", "sep", "3.2500", "loss (nats per token)"} <= set(texts)
    if name == "loss_vs_flops":
        assert f"training MFLOPs (flops/model: {CONVENTIONS['model'].label})" in texts


def test_page_needs_nothing_from_outside(output: Path) -> None:
    """No element that fetches, no script, no link; namespaces are the only addresses."""
    page = (output / "comparison.html").read_text(encoding="utf8")
    fetching: list[str] = []

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag in ("script", "link", "img", "iframe", "object", "image"):
                fetching.append(tag)
            fetching.extend(
                f"{name}={value}"
                for name, value in attrs
                if not name.startswith("xmlns") and re.search(r"//|url\((?!#)", value or "")
            )

    Elements().feed(page)
    assert fetching == []
    assert "@import" not in page and "@font-face" not in page


def test_page_is_sound(output: Path) -> None:
    page = (output / "comparison.html").read_text(encoding="utf8")
    assert "<title>Dense &amp; &lt;sep&gt;</title>" in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers)) > 100
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert references and references <= set(identifiers)
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ET.fromstring(drawing)
        # In the dark, ink and ground come from the page's theme.
        assert "#ffffff" not in drawing and "#1a1c1f" not in drawing and "currentColor" in drawing


def test_page_explains_every_convention_and_the_verdict(output: Path) -> None:
    page = (output / "comparison.html").read_text(encoding="utf8")
    for key, convention in CONVENTIONS.items():
        assert f"<dt>flops/{key}</dt>" in page
        assert convention.words.split(".")[0].replace("'", "&#x27;") in page
    assert "prefers-color-scheme: dark" in page
    assert "one run of each" in page
    assert "attention.pattern" in page


def test_typing_it_twice_gives_the_same_files(dense: Path, sep: Path, output: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert main([str(dense), str(sep), "--output", str(output), "--title", "Dense & <sep>"]) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_many_runs_stay_distinguishable(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folders = [
        str(make_run(f"run{number}", [validation(0, 6), validation(10, 4 + number / 10)])) for number in range(10)
    ]
    assert main([*folders, "--output", str(tmp_path / "out")]) == 0
    root = ET.parse(tmp_path / "out" / "loss_vs_tokens.svg").getroot()
    texts = {"".join(element.itertext()) for element in root.iter(f"{SVG}text")}
    assert {f"run{number}" for number in range(10)} <= texts
