"""sepllm env: what it finds, and what it advises."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from sepllm_train import requirements
from sepllm_train.cli.environment import advice, facts
from sepllm_train.distributed.all_reduce import measure_here
from tests.support.waiting import HANG_SECONDS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Facts of this machine."""
    folder = tmp_path_factory.mktemp("environment")
    return facts(folder / "runs", folder / "cache")


def installed(folder: Path, package: str, version: str) -> None:
    """Metadata of an installed package."""
    place = folder / f"{package}-{version}.dist-info"
    place.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}"]
    (place / "METADATA").write_text("\n".join([*lines, ""]))


@pytest.mark.distributed
def test_report_is_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    for name in ("NVIDIA_API_KEY", "TORCH_AUTH", "CUDA_PWD", "SEPLLM_CREDENTIALS", "NCCL_PASSPHRASE"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("SEPLLM_STORE", "redis://me:secret@host/x?token=secret")
    command = [sys.executable, "-m", "sepllm_train", "env", "--json", "--mebibytes=1"]
    done = subprocess.run(
        [*command, f"--run-root={tmp_path}/a/b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["python"]["executable"] == sys.executable
    assert report["packages"]["numpy"] == numpy.__version__
    assert report["packages"]["megatron-core"] == version("megatron-core")
    assert report["torch"]["version"] == torch.__version__ and report["torch"]["gpus"] == torch.cuda.device_count()
    assert report["run_root"]["path"] == f"{tmp_path}/a/b" and not (tmp_path / "a").exists()
    assert report["run_root"]["total"] == shutil.disk_usage(tmp_path).total and report["run_root"]["error"] is None
    assert report["self_test"]["gloo"]["processes"] == 2
    assert report["self_test"]["gloo"]["gigabytes_per_second"] > 0
    assert report["variables"]["NCCL_DEBUG"] == "WARN" and "secret" not in done.stdout
    assert report["variables"]["SEPLLM_STORE"] == "redis://me:***@host/x?token=***"


def test_unmet_requirements(found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number too new for the interpreter of kernels, and a package that is not there."""
    installed(tmp_path, "numpy", "9.1")
    asked = requirements.Declared(">=3.11", ["numpy<2.4", "not-there-at-all>=3", 'other; extra == "gpu"'])
    monkeypatch.setattr(requirements, "declared", lambda: asked)
    monkeypatch.syspath_prepend(str(tmp_path))
    told = advice(facts(tmp_path, tmp_path))
    assert "numpy 9.1 is not <2.4: pip install 'numpy<2.4'." in told
    assert "not-there-at-all is missing: pip install 'not-there-at-all>=3'." in told
    assert not any("other" in sentence.split()[0] for sentence in told)


def test_apex_of_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert any("pip uninstall apex" in sentence for sentence in advice(facts(tmp_path, tmp_path)))
    (tmp_path / "amp_C.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not any("pip uninstall apex" in sentence for sentence in advice(facts(tmp_path, tmp_path)))


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or not Path("/sys").is_dir(), reason="needs /dev/shm and /sys")
def test_disks() -> None:
    told = advice(facts(Path("/dev/shm/runs"), Path("/sys/cache")))
    assert any(sentence.startswith("run_root=/dev/shm/runs is on a tmpfs") for sentence in told)
    assert any(sentence.startswith("cache=/sys/cache cannot be written (") for sentence in told)


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("python", {"version": "3.14.1"}, "Python 3.14 is not tested yet"),
        ("torch", {"error": "ImportError: libcudnn.so.9"}, "torch cannot be imported"),
        ("run_root", {"free": 1 << 30}, "has 1.0 GiB left"),
        ("machine", {"shared_memory": 64 << 20}, "/dev/shm holds 64 MiB"),
        ("machine", {"infiniband": ["mlx5_0"], "locked_memory": "8 MiB"}, "needs locked memory"),
        ("self_test", {"gloo": {"backend": "gloo", "processes": 2, "error": "x"}}, "GLOO_SOCKET_IFNAME"),
    ],
)
def test_advice(found: dict[str, Any], section: str, changes: dict[str, Any], words: str) -> None:
    changed = copy.deepcopy(found)
    changed[section] = changed.get(section, {}) | changes
    assert any(words in sentence for sentence in advice(changed))
    assert not any(words in sentence for sentence in advice(found)) or section == "run_root"


@pytest.mark.parametrize(
    ("torch_facts", "words"),
    [
        ({"cuda": None, "gpus": 0, "nccl": None}, "a build without CUDA"),
        ({"cuda": "13.0", "gpus": 0, "nccl": "2.27.5"}, "none of the GPUs"),
        ({"cuda": "13.0", "gpus": 8, "nccl": None}, "has no NCCL"),
    ],
)
def test_advice_on_gpus(found: dict[str, Any], torch_facts: dict[str, Any], words: str) -> None:
    gpu = {"devices": ["NVIDIA H100"] * 8, "driver": "535.104.05", "topology": None}
    changed = {**copy.deepcopy(found), "gpu": gpu, "torch": {**found["torch"], **torch_facts}}
    assert any(words in sentence for sentence in advice(changed))


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_failing_self_test_is_told() -> None:
    test = measure_here("nccl", 1, 1)
    assert "error" in test and "seconds" not in test
