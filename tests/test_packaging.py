"""The wheel works away from the checkout: packages, configurations, entry points."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


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
    names = "sepllm_train, sepllm_train.compare_runs, sepllm_train.training, data_prep, sep_attention"
    done = run_python(
        f"import {names}; print(sepllm_train.__file__, data_prep.__file__, sep_attention.__file__)", unpacked
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(unpacked)) for path in done.stdout.split())


def test_configurations_travel(unpacked: Path, repository: Path) -> None:
    done = run_python(
        "from sepllm_train.pretrain import main; main()", unpacked, "+experiment=pythia160m_sep", "--cfg", "job"
    )
    assert done.returncode == 0, done.stderr
    assert "name: pythia160m_sep" in done.stdout
    shipped = {path.relative_to(unpacked / "sepllm_train" / "configs") for path in unpacked.rglob("*.yaml")}
    assert shipped == {path.relative_to(repository / "configs") for path in (repository / "configs").rglob("*.yaml")}


def test_the_page_of_runs_travels(unpacked: Path, repository: Path) -> None:
    folder = Path("sepllm_train", "serve", "page")
    shipped = {path.name for path in (unpacked / folder).iterdir()}
    assert shipped == {path.name for path in (repository / folder).iterdir()} and "page.html" in shipped


def test_entry_points_exist(unpacked: Path) -> None:
    (table,) = unpacked.glob("*.dist-info/entry_points.txt")
    targets = [line.split("=")[1].strip() for line in table.read_text().splitlines() if "=" in line]
    assert len(targets) == 3
    for target in targets:
        module, name = target.split(":")
        done = run_python(f"from {module} import {name} as main; assert callable(main)", unpacked)
        assert done.returncode == 0, done.stderr
