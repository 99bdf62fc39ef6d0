"""Readers of what runs and checkpoints leave: manifest.json, state.json, run.json, metrics.jsonl and `.metadata`."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pickle
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.config.load import configuration_of
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.runs.open import Checkpoint
from sepllm_train.runs.records import read_run
from sepllm_train.training.checkpoint.files import damage, read_manifest
from sepllm_train.training.checkpoint.identity import check_identity, check_unseen, trained_on
from sepllm_train.training.checkpoint.metadata import read_metadata
from sepllm_train.training.run_folder import enter
from sepllm_train.training.state import TrainState

ARCHIVE = Path(__file__).resolve().parents[1] / "golden" / "files" / "run.tar.gz"
Target = Callable[[random.Random, Path], None]
# Values of other types, of no sense, and at the ends of their ranges.
ODD = (
    None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 1e-320, 2**31, 2**63, 2**64, 10**30, 10**400, float("nan"),
    float("inf"), "", "x", "../x", "\0", "ä", "\ud800", "9" * 50, [], [[]], {}, {"": None}, [None] * 3, [1, "2"],
)  # fmt: skip


@functools.cache
def stored() -> dict[str, bytes]:
    """Files of the run that an earlier version wrote, by their path in its folder; of the checkpoint by their name."""
    with tarfile.open(ARCHIVE) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        found = {name.split("/", 1)[1]: file.read() for name, file in files.items() if file is not None}
    step = next(name for name in found if name.endswith("manifest.json")).removesuffix("manifest.json")
    return {name.removeprefix(step): content for name, content in found.items()}


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """Some bytes changed, cut out, repeated or put in."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(changed) + 1)
        length = draw.choice((1, 1, 1, 2, 4, 8, 64))
        how = draw.randrange(5)
        if how == 0:
            changed[at : at + length] = draw.randbytes(length)
        elif how == 1:
            del changed[at : at + length]
        elif how == 2:
            changed[at:at] = changed[at : at + length] * draw.choice((1, 2, 100))
        elif how == 3:
            changed[at:at] = draw.choice((b"[", b"{", b'"', b"\0", b"\xff", b"1e999", b"NaN", b"[" * 2000, b"9" * 5000))
        else:
            del changed[at:]
    return bytes(changed)


def mutated_json(draw: random.Random, value: Any) -> Any:
    """Some values exchanged for odd ones, some keys gone or new, or one value moved to another's place."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 3)):
        places = list(_places(value))
        holder, key = draw.choice(places)
        how = draw.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[draw.choice(("", "x", "step", "..", "\0"))] = copy.deepcopy(draw.choice(ODD))
        elif how == 2:
            other, name = draw.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                holder[key] = json.loads(json.dumps(other[name]))
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD))
        if not value:
            break
    return value


def _places(value: Any) -> Any:
    """(container, key) of every value inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def mutated(draw: random.Random, content: bytes) -> bytes:
    """A JSON text, changed as text or as what it holds."""
    if draw.random() < 0.4:
        return mutated_bytes(draw, content)
    return json.dumps(mutated_json(draw, json.loads(content))).encode()


def checkpoint_in(folder: Path) -> Path:
    """A whole checkpoint of its own for each folder; the files of a test before are put back."""
    checkpoint = folder / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name, content in stored().items():
        if "/" not in name and name != "manifest.json" and not (checkpoint / name).exists():
            (checkpoint / name).write_bytes(content)
    (checkpoint / "manifest.json").write_bytes(stored()["manifest.json"])
    return checkpoint


def manifest(draw: random.Random, folder: Path) -> None:
    """manifest.json: which files are read, and whether the checkpoint is whole."""
    checkpoint = checkpoint_in(folder)
    (checkpoint / "manifest.json").write_bytes(mutated(draw, stored()["manifest.json"]))
    with contextlib.suppress(UserError):
        assert all((checkpoint / name).parent == checkpoint for name in read_manifest(checkpoint))
    damage(checkpoint)


def state(draw: random.Random, folder: Path) -> None:
    """state.json: what is read of it to resume, and to analyse."""
    checkpoint, wanted = checkpoint_in(folder), json.loads(stored()["state.json"])["identity"]
    (checkpoint / "state.json").write_bytes(mutated(draw, stored()["state.json"]))
    try:
        found = Checkpoint.read(checkpoint)
        TrainState.from_dict(found.state["state"])
        assert found.step >= 0 and found.tokens >= 0 and found.vocabulary >= 1
        trained_on(found.identity)
        check_unseen(found.identity, {"data.tokens_sha256": {}, "data.validation_fraction": 0.0}, "here")
        check_identity(found.identity, wanted, "here", "mend it")
        _ = found.attention
    except UserError:
        pass
    finally:
        (checkpoint / "state.json").write_bytes(stored()["state.json"])


def run_json(draw: random.Random, folder: Path) -> None:
    """run.json: of a run that is compared, and of one that enters its folder again."""
    (folder / "metrics.jsonl").write_bytes(stored()["metrics.jsonl"])
    (folder / "run.json").write_bytes(mutated(draw, stored()["run.json"]))
    with contextlib.suppress(UserError):
        read_run(folder)
    with contextlib.suppress(UserError):
        enter(_config(folder), {}, {})
    with contextlib.suppress(UserError):
        enter(_config(folder, "resume=never"), {}, {})


@functools.cache
def _config(folder: Path, *overrides: str) -> Any:
    return configuration_of([f"name={folder.name}", f"run_root={folder.parent}", *overrides])


def metrics(draw: random.Random, folder: Path) -> None:
    """metrics.jsonl: of a run that is compared, and of one that resumes."""
    lines = stored()["metrics.jsonl"].split(b"\n")
    number = draw.randrange(len(lines) - 1)
    lines[number] = mutated(draw, lines[number])
    (folder / "run.json").write_bytes(stored()["run.json"])
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with contextlib.suppress(UserError):
        run = read_run(folder)
        assert all(record["step"] >= 0 for record in run.training + run.validation)
    log = MetricsLog(folder / "metrics.jsonl")
    log.has(draw.randint(0, 4), "val/loss")
    with contextlib.redirect_stdout(None):
        log.rewind(draw.randint(-1, 4))
    json.loads(b"[" + b",".join((folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]) + b"]")


# Operations of pickles, those that a description of tensors has no use for included, and what may follow them.
OPERATIONS = [
    getattr(pickle, name) for name in dir(pickle) if name.isupper() and isinstance(getattr(pickle, name), bytes)
]
NAMES = (
    b"builtins\neval\n",
    b"os\nsystem\n",
    b"torch\nSize\n",
    b"torch\nload\n",
    b"torch.serialization\n_get_layout\n",
)


def metadata(draw: random.Random, folder: Path) -> None:
    """`.metadata`: reading it makes none of what it names, and what is read describes whole tensors."""
    checkpoint, content = checkpoint_in(folder), bytearray(stored()[".metadata"])
    if draw.random() < 0.5:
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content))
            operation = draw.choice(OPERATIONS)[:1]
            argument = draw.choice((b"", draw.randbytes(4), struct.pack("<Q", draw.getrandbits(64)), *NAMES))
            content[at : at + draw.choice((0, 1, 1, len(argument) + 1))] = operation + argument
    else:
        content = bytearray(mutated_bytes(draw, bytes(content)))
    (checkpoint / ".metadata").write_bytes(content)
    try:
        read_metadata(checkpoint)
    except (UserError, pickle.UnpicklingError):
        pass
    finally:
        (checkpoint / ".metadata").write_bytes(stored()[".metadata"])


TARGETS: dict[str, Target] = {
    "manifest.json": manifest,
    "state.json": state,
    "run.json": run_json,
    "metrics.jsonl": metrics,
    ".metadata": metadata,
}
