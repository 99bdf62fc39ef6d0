"""A Python that has torch and transformers and nothing of this project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.waiting import HANG_SECONDS

OURS = ("sepllm", "sep_attention", "data_prep", "__editable__", "_sepllm")


def packages_without_ours(folder: Path) -> Path:
    """A folder of links to whatever is installed beside torch and transformers, but for this project."""
    folder.mkdir()
    for installed in {Path(module.__file__).parent.parent for module in (torch, transformers)}:
        for entry in installed.iterdir():
            if not entry.name.startswith(OURS) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def run_bare(packages: Path, modules: Path, script: Path, *arguments: Any) -> str:
    """Run a script with `packages` alone; `modules`: folder where transformers keeps remote code. Gives its output."""
    start = (
        "import sys, runpy; sys.path.append(sys.argv[1]); sys.argv = sys.argv[2:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start, *map(str, (packages, script, *arguments))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)},
        timeout=2 * HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
