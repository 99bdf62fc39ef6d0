"""Hydra: where the configurations are, their schema, and its errors as one sentence."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sepllm_train.config import schema
from sepllm_train.errors import UserError


def config_folder() -> Path:
    """Folder of the YAML files: configs/ of the checkout, or the copy inside the installed package."""
    checkout = Path(__file__).resolve().parents[2] / "configs"
    return checkout if checkout.is_dir() else Path(str(resources.files("sepllm_train") / "configs"))


def register_schema() -> None:
    """Store the dataclasses under the name that pretrain.yaml inherits from."""
    ConfigStore.instance().store(name="schema", node=schema.Config)


def to_config(config: DictConfig) -> schema.Config:
    """Check a composed configuration and return it as dataclasses. Raises UserError."""
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(one_sentence(error)) from None
    assert isinstance(result, schema.Config)
    return result


def run_with_hydra(task: Callable[[schema.Config], None]) -> None:
    """Compose the configuration from the command line and call `task` with it.

    Hydra prints composition errors with a hint about its own variables and exits with 1; here they become one
    sentence and exit code 2, like every other mistake of the user's.
    """
    register_schema()
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"

    failures: list[UserError] = []

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="pretrain")
    def decorated(config: DictConfig) -> None:
        # Raised through Hydra, the sentence would come with Hydra's own lines on every rank.
        try:
            task(to_config(config))
        except UserError as error:
            failures.append(error)

    try:
        decorated()
    except (HydraException, OmegaConfBaseException) as error:
        if show_traceback:
            raise
        raise UserError(one_sentence(error)) from None
    if failures:
        raise failures[0]


def one_sentence(error: Exception) -> str:
    """What Hydra or OmegaConf complains about, without its layout, with the nearest known name where one is near."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    text = f"{text} ({key})" if key and key not in text else text
    if "Could not find" in text:
        text = f"{text}; {_known_files(text)}"
    elif "not in struct" in text or "Could not override" in text:
        text = f"{text.rstrip('.')}; see --cfg job for every key{_nearest_key(key or text)}."
    return f"configuration: {text}" if text.endswith(".") else f"configuration: {text}."


def _known_files(text: str) -> str:
    """The files of the group that a missing file was looked for in."""
    wanted = text.split("'")[1] if "'" in text else ""
    group, _, name = wanted.rpartition("/")
    known = sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}known are {', '.join(known)}" if known else "see configs/"


def _nearest_key(text: str) -> str:
    """'; did you mean KEY?' for the configuration key nearest to the one in `text`, or nothing."""
    default = OmegaConf.structured(schema.Config)
    keys = [f"{g}.{k}" for g, node in default.items() if OmegaConf.is_config(node) for k in node] + list(default)
    wanted = next((word.strip("'") for word in text.split() if word.startswith("'")), text)
    near = difflib.get_close_matches(wanted, keys, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?".rstrip("?") + "?" if near else ""
