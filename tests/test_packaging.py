"""The wheel works away from the checkout: packages, configurations, entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.small_run import SMALL_MODEL

SEPLLM = "import sys; from sepllm_train.cli.main import main; "


@pytest.fixture(scope="module")
def unpacked(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (repository / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repository / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("sepllm_train-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run_python(code: str, unpacked: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code with the unpacked wheel first on the path, away from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=unpacked.parent, env=environment, capture_output=True, text=True
    )


def test_packages_come_from_the_wheel(unpacked: Path) -> None:
    names = "sepllm_train, sepllm_train.cli.main, sepllm_train.training, data_prep, sep_attention"
    done = run_python(
        f"import {names}; print(sepllm_train.__file__, data_prep.__file__, sep_attention.__file__)", unpacked
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(unpacked)) for path in done.stdout.split())
    assert not (unpacked / "benchmarks").exists()


def test_configurations_travel(unpacked: Path, repository: Path) -> None:
    done = run_python(f"{SEPLLM}sys.exit(main())", unpacked, "pretrain", "+experiment=pythia160m_sep", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "name: pythia160m_sep" in done.stdout
    shipped = {path.relative_to(unpacked / "sepllm_train" / "configs") for path in unpacked.rglob("*.yaml")}
    assert shipped == {path.relative_to(repository / "configs") for path in (repository / "configs").rglob("*.yaml")}


def test_every_command_travels(unpacked: Path) -> None:
    """Away from the checkout and from its configurations."""
    code = f"{SEPLLM}from sepllm_train.cli.main import COMMANDS\nfor name in COMMANDS:\n" + (
        "    try:\n        assert main([name, '--help']) == 0, name\n"
        "    except SystemExit as ended:\n        assert not ended.code, name\n"
    )
    done = run_python(code, unpacked)
    assert done.returncode == 0, done.stderr
    assert "demo_dense, demo_sep" in done.stdout


def test_the_page_of_runs_travels(unpacked: Path, repository: Path) -> None:
    folder = Path("sepllm_train", "watch", "page")
    shipped = {path.name for path in (unpacked / folder).iterdir()}
    assert shipped == {path.name for path in (repository / folder).iterdir()} and "page.html" in shipped


def test_entry_points_exist(unpacked: Path) -> None:
    (table,) = unpacked.glob("*.dist-info/entry_points.txt")
    targets = dict(line.split(" = ") for line in table.read_text().splitlines() if "=" in line)
    assert set(targets) == {"sepllm", "sepllm-pretrain", "sepllm-prepare-data", "sepllm-compare-runs"}
    for target in targets.values():
        module, name = target.split(":")
        done = run_python(f"from {module} import {name} as main; assert callable(main)", unpacked)
        assert done.returncode == 0, done.stderr


def test_programs_look_at_their_environment(unpacked: Path, tmp_path: Path) -> None:
    """The wheel's own metadata hold the ranges there."""
    place = tmp_path / "torch-2.9.1.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {SEPLLM}sys.exit(main())"
    done = run_python(code, unpacked, "pretrain", "+experiment=demo_sep")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "error: torch 2.9.1 is not <2.16,>=2.11: pip install" in done.stderr


TRAINING = """
import sys
from pathlib import Path

checkout = Path(sys.argv.pop(1))
from sepllm_train.cli.main import main
assert main(["pretrain", *sys.argv[1:]]) == 0
ours = [checkout / name for name in ("sepllm_train", "data_prep", "kernels", "benchmarks", "scripts", "configs")]
files = [Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
assert not [file for file in files for folder in ours if file.is_relative_to(folder)]
"""


@pytest.mark.slow
def test_training_away_from_the_checkout(unpacked: Path, repository: Path, sample_cache: Path, tmp_path: Path) -> None:
    """A dry run and five steps, with no module of the checkout."""
    words = ["+experiment=demo_sep", *SMALL_MODEL, "training.steps=5", f"run_root={tmp_path}"]
    words += [f"data.cache={sample_cache}", "training.validation_interval=5", "training.checkpoint_interval=5"]
    done = run_python(TRAINING, unpacked, str(repository), *words, "dry_run=true")
    assert done.returncode == 0 and "dry run: the checks of a run" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())
    done = run_python(TRAINING, unpacked, str(repository), *words)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "demo_sep" / "metrics.jsonl").read_text().splitlines()]
    assert len([record for record in records if "train/loss" in record]) == 5
