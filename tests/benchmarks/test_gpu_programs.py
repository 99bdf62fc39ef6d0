"""The GPU benchmarks as far as a CPU goes: they run in Triton's interpreter, resume, and their results are drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention.draw import NOT_MEASURED, best_dense, load_results, merged_rows, section, teraflops
from benchmarks.attention.gpu import (
    GROUPS,
    HEAD_SIZES,
    LENGTHS,
    MAIN_LENGTHS,
    SOURCES,
    WINDOWS,
    cells,
    main,
    open_results,
)
from benchmarks.common import write_json
from sepllm_train.base.errors import UserError
from tests.benchmarks.conftest import Program
from tests.support.triton_support import needs_triton

ATTENTION = "benchmarks.attention.gpu"
DRAW = "benchmarks.attention.draw"
SMALL = ("--device", "cpu", "--tokens", 48, "--hidden", 32, "--windows", 8, "--head-sizes", 32, "--groups", 1)


@needs_triton
def test_kernels_are_timed_checked_and_resumed(program: Program, tmp_path: Path) -> None:
    output = tmp_path / "attention-cpu.json"
    first = program(ATTENTION, *SMALL, "--lengths", 48, "--sources", "text", "--output", output, interpret=True)
    assert first.returncode == 0, first.stderr
    (row,) = json.loads(output.read_text(encoding="utf8"))["rows"]
    assert row["kernels"]["ours"]["error"] == 0.0
    assert row["kernels"]["sdpa"]["error"] < 1e-5 and row["kernels"]["sdpa"]["both"]["median"] > 0
    assert "no backward pass on CPU" in row["kernels"]["flex"]["reason"]
    assert 0 < row["needed_pairs"] < row["touched_pairs"]["forward"]
    again = program(ATTENTION, *SMALL, "--lengths", 48, "--sources", "text", "--output", output, interpret=True)
    assert again.returncode == 0 and "S=48" not in again.stdout
    assert not list(tmp_path.glob("*.partial"))


def test_results_of_another_setting_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "attention-cpu.json"
    options = argparse.Namespace(tokens=48, hidden=32, text=None, baselines=None, output=output)
    path, results = open_results(options, torch.device("cpu"))
    write_json(path, results | {"rows": [{"length": 48}]})
    assert open_results(options, torch.device("cpu"))[1]["rows"] == [{"length": 48}]
    options.tokens = 96
    with pytest.raises(UserError, match="attention-cpu.json is of another machine, version or setting"):
        open_results(options, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_attention.py"])
    with pytest.raises(UserError, match="There is no CUDA device here"):
        main()


def test_the_most_telling_cells_come_first() -> None:
    lists = {"lengths": LENGTHS, "windows": WINDOWS, "head_sizes": HEAD_SIZES, "groups": GROUPS, "sources": SOURCES}
    ordered = cells(argparse.Namespace(**lists))
    assert len(ordered) == len(set(ordered)) == 9 * 3 * 2 * 2 * 4
    assert {cell[:2] + cell[3:] for cell in ordered[:10]} == {(length, 128, 1, "text") for length in MAIN_LENGTHS}
    assert {cell[:2] + cell[3:] for cell in ordered[10:20]} == {(length, 128, 1, "12%") for length in MAIN_LENGTHS}


def _timing(milliseconds: float) -> dict[str, Any]:
    one = {"median": milliseconds, "low": milliseconds, "high": milliseconds, "calls": 9}
    return {"error": 0.001, "forward": one, "backward": one, "both": one}


def _file(time: str, length: int, **kernels: dict[str, Any]) -> dict[str, Any]:
    machine = dict.fromkeys(("device", "driver", "cuda", "cudnn", "torch", "triton", "kernels"), "1")
    row = {"length": length, "window": 128, "head_size": 64, "groups": 1, "source": "text", "batch": 2, "heads": 4}
    row |= {"density": 0.16, "needed_pairs": 1e6, "kernels": {name.replace("_", " "): x for name, x in kernels.items()}}
    row["touched_pairs"] = {"forward": 2e6, "backward_q": 2e6, "backward_kv": 3e6}
    limits = [{"bf16_matmul_tflops": 700.0, "copy_gbytes_per_second": 3000.0}]
    return {"machine": machine, "time": time, "limits": limits, "rows": [row]}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two files of one machine that time the same cell, dense baselines and FlexAttention; one of other kernels."""
    ours, cudnn = {"sparse": True, **_timing(2.0)}, {"sparse": False, **_timing(5.0)}
    flash, missing = {"sparse": False, **_timing(4.0)}, {"sparse": False, "reason": "ImportError: none"}
    dense = {"ours": ours, "cudnn": cudnn, "flash_sdpa": flash, "flash-attn 3": missing}
    slower = {"ours": {"sparse": True, **_timing(3.0)}, "flex": {"sparse": True, **_timing(9.0)}}
    files = [
        _file("2026-01-02", 2048, **dense),
        _file("2026-01-03", 2048, **slower),
        _file("2026-01-01", 4096, **dense),
    ]
    files[2]["machine"] = files[2]["machine"] | {"kernels": "older"}
    for number, content in enumerate(files):
        (tmp_path / f"attention-{number}.json").write_text(json.dumps(content), encoding="utf8")
    return tmp_path


def test_ratios_are_of_one_run(results: Path) -> None:
    (row,) = merged_rows(load_results(results))
    assert best_dense(row) == (2.0, "flash sdpa")
    assert row["ratios"]["flex", "both"] == (3.0, True)
    needed, touched = teraflops(row)
    assert needed == pytest.approx(14 * 1e6 * 64 * 4 * 2 / 2e-3 / 1e12)
    assert touched == pytest.approx((4 * 2e6 + 6 * 2e6 + 8 * 3e6) * 64 * 4 * 2 / 2e-3 / 1e12)
    text = section(load_results(results))
    assert "2.00x (bar 1.5x met)" in text and "3.00x (bar 2.5x met)" in text
    assert "- flash-attn 3: ImportError: none" in text and "4096" not in text


def test_document_and_picture(program: Program, results: Path) -> None:
    target = results / "docs" / "performance.md"
    target.parent.mkdir()
    target.write_text("before\n<!-- kernel results -->\nold\n<!-- end kernel results -->\nafter\n", encoding="utf8")
    drawn = program(DRAW, "--results", results, "--document", target)
    assert drawn.returncode == 0, drawn.stderr
    content, picture = target.read_text(encoding="utf8"), target.parent / "images" / "kernels.svg"
    assert content.startswith("before\n<!--") and content.endswith("-->\nafter\n") and "old" not in content
    assert picture.read_text(encoding="utf8").startswith("<?xml")
    for path in results.glob("*.json"):
        path.unlink()
    picture.unlink()
    assert program(DRAW, "--results", results, "--document", target).returncode == 0
    assert NOT_MEASURED in target.read_text(encoding="utf8") and not picture.exists()
    target.write_text("no marks", encoding="utf8")
    refused = program(DRAW, "--results", results, "--document", target)
    assert refused.returncode == 2 and "must hold the lines <!-- kernel results -->" in refused.stderr
