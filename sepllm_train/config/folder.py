"""Folder of the YAML files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def config_folder() -> Path:
    """Folder of the YAML files: configs/ of the checkout, or the copy inside the installed package."""
    checkout = Path(__file__).resolve().parents[2] / "configs"
    return (
        checkout if (checkout / "pretrain.yaml").is_file() else Path(str(resources.files("sepllm_train") / "configs"))
    )
