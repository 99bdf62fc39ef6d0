"""A suite at its toy size: real runs, real timing, one report, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.sidecar import read_header
from sepllm_train.base.errors import UserError
from sepllm_train.cli.main import main
from sepllm_train.suite.export import unpack
from sepllm_train.suite.prepare import prepare_data
from sepllm_train.training.run_folder import claim
from tests.suite.test_plan import suite as suite_config
from tests.support.waiting import HANG_SECONDS, wait_until

TOY = ("+suite=paper", "suite.size=toy", "suite.lengths=[128]", "suite.jobs=2", "sizes.toy.timing_rounds=1")


@dataclass(frozen=True)
class Suite:
    """Starts sepllm suite at its toy size, on the sample corpus as a prepared dataset."""

    repository: Path
    cache: Path
    prefix: Path
    root: Path

    def command(self, *overrides: str) -> list[str]:
        """The command line."""
        places = [f"suite.root={self.root}", f"suite.prefix={self.prefix}"]
        return [sys.executable, "-m", "sepllm_train", "suite", *TOY, *places, *overrides]

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the command."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "SEPLLM_CACHE": str(self.cache)}

    def __call__(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            self.command(*overrides),
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env=self.environment,
            check=False,
        )

    def here(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        """As a call, in this process, for what starts no run: a process imports for longer than that takes."""
        command = self.command(*overrides)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as output,
            contextlib.redirect_stderr(io.StringIO()) as errors,
        ):
            patch.setenv("SEPLLM_CACHE", str(self.cache))
            code = main(command[3:])
        return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())

    @property
    def folder(self) -> Path:
        """Where the suite is written."""
        return self.root / "paper-toy"

    def status(self, run: str) -> str | None:
        """Status of a run, None when it was never begun."""
        path = self.folder / "runs" / run / "run.json"
        return json.loads(path.read_text())["status"] if path.exists() else None


@pytest.fixture
def suite(repository: Path, sample_cache: Path, sample_prefix: Path, tmp_path: Path) -> Suite:
    """A suite in a folder of its own."""
    return Suite(repository, sample_cache, sample_prefix, tmp_path)


@pytest.mark.slow
def test_trains_times_and_reports(suite: Suite) -> None:
    variants = "suite.only.variants=[dense,sep,streaming]"
    exported = suite.root / "exported" / "paper-toy"
    done = suite(variants, f"suite.export={exported}")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [f"{row}_128_seed{seed}" for seed in (1, 2) for row in ("dense", "streaming", "sep")]
    assert [suite.status(name) for name in names] == ["finished"] * 6
    assert suite.status("fixed_128_seed1") is None
    timing = json.loads((suite.folder / "timing_128.json").read_text())
    assert len(timing["rows"]["sep"]["turns"]) == 1 and timing["rows"]["sep"]["step_seconds"] > 0

    figures = json.loads((suite.folder / "report" / "report.json").read_text())["128"]
    assert [row["label"] for row in figures["rows"]] == ["dense", "streaming", "sep"]
    assert [len(row["runs"]) for row in figures["rows"]] == [2, 2, 2]
    shares = figures["shares"]
    assert shares["dense"]["attended"] == shares["dense"]["kept"] == 1.0
    # Initial tokens and a window of 16 of 128 tokens, and what separators add.
    assert shares["streaming"]["kept"] == 19 / 128 < shares["sep"]["kept"] < 0.5
    assert shares["sep"]["flops"]["flops/model"] < shares["dense"]["flops"]["flops/model"]
    evaluated = json.loads((suite.folder / "evaluations.json").read_text())
    assert set(evaluated) == set(names) and all(one["tokens"] == 1024 for one in evaluated.values())
    text = (suite.folder / "report" / "report.md").read_text()
    assert "6 of its 14 runs are finished" in text and "The last checkpoints on 1,024 held-out tokens" in text
    assert "flops/paper a token" in text and "validation loss of dense" in text

    # The copy tells nothing of this machine's folders, and gives the same report.
    for path in (path for path in exported.rglob("*") if path.is_file()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert str(suite.root).encode() not in content, path
        assert str(suite.prefix.parent).encode() not in content, path
    (exported / "report.md").unlink()
    inside = suite.here("suite.do=[report]", f"suite.export={suite.folder / 'copy'}")
    assert inside.returncode == 2 and "is inside the suite's own folder" in inside.stderr
    remade = Suite(suite.repository, suite.cache, suite.prefix, exported.parent).here("suite.do=[report]")
    assert remade.returncode == 0, remade.stderr
    assert (exported / "report.md").read_text() == text
    # A suite that continues from the copy, with a run that is older than the plan, as one copied from another suite.
    unpack(exported, exported)
    assert {path.name for path in (exported / "runs").iterdir()} == set(names)
    copied = exported / "runs" / names[0] / "environment.json"
    environment = json.loads(copied.read_text())
    copied.write_text(json.dumps(environment | {"started": "2026-01-31T12:00:00Z"}))
    assert Suite(suite.repository, suite.cache, suite.prefix, exported.parent).here("suite.do=[report]").returncode == 0
    assert "before the first run" in text
    assert ", when 1 of its runs had begun. 6 of" in (exported / "report" / "report.md").read_text()

    before = {name: (suite.folder / "runs" / name / "metrics.jsonl").stat().st_mtime_ns for name in names}
    again = suite.here(variants, "suite.do=[train]")
    assert again.returncode == 0 and "6 runs, 6 finished before" in again.stdout
    assert {n: (suite.folder / "runs" / n / "metrics.jsonl").stat().st_mtime_ns for n in names} == before

    other = suite.here(variants, "sizes.toy.steps=9")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "was fixed before the first run" in other.stderr


def test_text_is_prepared_once_and_dry_runs_say_what_would_be_run(suite: Suite, tmp_path: Path) -> None:
    text = tmp_path / "a text.txt"
    missing = suite.here("suite.prefix=null", f"suite.text=['{text}']", "suite.dry_run=true")
    assert missing.returncode == 2
    assert missing.stderr == f"error: There is no file {text}: give .txt, .jsonl or .parquet files.\n"
    words = "It was a bright, cold day. The clocks; they struck: thirteen! Who was there? Nobody knew.\n"
    text.write_text("".join(f"{number} {words}" for number in range(400)))
    choice = ("suite.prefix=null", f"suite.text=['{text}']", "sizes.toy.vocabulary=320")
    shown = suite.here(*choice, "suite.dry_run=true", "suite.only.variants=[sep]", "suite.only.seeds=[2]")
    assert shown.returncode == 0 and not suite.folder.exists()
    (command, last) = shown.stdout.splitlines()
    overrides = shlex.split(command)
    assert "attention=sep" in overrides and "seed=2" in overrides
    assert f"data.prefixes=['{suite.folder / 'data' / 'text'}']" in overrides
    assert last == "dry run: 1 runs; nothing was trained."

    config = suite_config(*TOY, f"suite.root={suite.root}", *choice)
    prefix = prepare_data(config, suite.folder)
    assert prefix is not None and read_header(prefix).tokenizer.vocab_size == 320
    assert prepare_data(config, suite.folder) == prefix
    other = suite_config(*TOY, f"suite.root={suite.root}", *choice[:-1], "sizes.toy.vocabulary=400")
    with pytest.raises(UserError, match="was made with tokenizer '320 entries, trained on the text', where it is now"):
        prepare_data(other, suite.folder)


def test_one_suite_at_a_time_in_a_folder(suite: Suite) -> None:
    with claim(suite.folder):
        second = suite("suite.do=[train]")
    assert second.returncode == 2 and "another process" in second.stderr and second.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_does_not_stop_the_others(suite: Suite) -> None:
    # What no check sees before: the second step's loss is not finite.
    wild = "'optim.lr=1e30','optim.min_lr=0','optim.warmup_steps=0','training.max_bad_steps=1'"
    broken = f"suite.variants.sep=['attention=sep',{wild}]"
    done = suite("suite.do=[train]", "suite.only.seeds=[1]", broken, "suite.only.variants=[sep,streaming]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 of 2 runs failed: sep_128_seed1 (")
    assert done.stderr.count("\n") == 1
    assert suite.status("streaming_128_seed1") == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_stops_the_suite_and_the_same_command_continues(suite: Suite, processes: int) -> None:
    choice = (
        f"sizes.toy.processes={processes}",
        "suite.do=[train]",
        "suite.only.seeds=[1]",
        "suite.only.variants=[sep]",
        "sizes.toy.steps=100000",
    )
    process = subprocess.Popen(
        suite.command(*choice), env=suite.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = suite.folder / "runs" / "sep_128_seed1" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "a record", process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=HANG_SECONDS)
    assert "stopping 1 runs, which save first" in output
    assert process.returncode == 75 and "SIGTERM stopped the suite: the same command continues it." in errors
    assert suite.status("sep_128_seed1") == "interrupted"
    latest = suite.folder / "runs" / "sep_128_seed1" / "checkpoints" / "latest"
    assert latest.is_file()
