"""The results file, written whole after every case, and the key that a finished case must share to be kept."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.multi_gpu.cases import Case
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_json
from sepllm_train.base.parsing import read_json_if_any
from sepllm_train.config.load import config_folder

FORMAT = 1
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
STATUSES = (PASSED, FAILED, SKIPPED)
# Packages that a measurement depends on; the configurations are a folder of their own.
PACKAGES = ("sepllm_train", "data_prep", "sep_attention", "benchmarks.multi_gpu")
SETTINGS = ("NCCL_", "CUDA_", "TORCH_NCCL_", "PYTORCH_")


def code_fingerprint() -> str:
    """SHA-256 over the names and contents of the project's Python and YAML files, changes not committed included."""
    folders = {"configs": config_folder()}
    for name in PACKAGES:
        # Found without being imported: torch would come along.
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        folders[name] = Path(spec.origin).parent
    total = hashlib.sha256()
    for name, folder in sorted(folders.items()):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".yaml", ".json") and path.is_file():
                total.update(f"{name}/{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def machine_fingerprint(facts: dict[str, Any], device: str) -> str:
    """SHA-256 of host, processor, GPUs, driver, packages and the variables that change communication."""
    torch, gpu = facts["torch"], facts["gpu"]
    own = {
        "device": device,
        "host": platform.node(),
        "processor": facts["machine"]["processor"],
        "gpus": gpu["devices"],
        "driver": gpu["driver"],
        "torch": [torch.get("version"), torch.get("cuda"), torch.get("nccl")],
        "packages": facts["packages"],
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Results:
    """results.json of a folder. `cases` has the record of each case by id."""

    def __init__(self, path: Path, code: str, machine: str) -> None:
        self.path = path
        self.key = {"code": code, "machine": machine}
        self.cases: dict[str, dict[str, Any]] = {}
        self.header: dict[str, Any] = {}

    def load(self) -> None:
        """Read what an earlier call has left. Raises UserError for a file that is not the kit's."""
        if not self.path.exists():
            return
        content = read_json_if_any(self.path)
        cases = content.get("cases") if content.get("format") == FORMAT else None
        if not isinstance(cases, dict) or not all(
            isinstance(record, dict) and record.get("status") in STATUSES for record in cases.values()
        ):
            raise UserError(f"{self.path} is not a results file of this program: choose another --output.")
        self.cases = cases

    def case_key(self, case: Case) -> str:
        """Hash of all that the record of a case depends on: code, machine and its definition, estimates aside."""
        own = {key: value for key, value in asdict(case).items() if key not in ("seconds", "priority")}
        return hashlib.sha256(json.dumps([self.key, own], sort_keys=True).encode()).hexdigest()[:16]

    def finished(self, case: Case) -> bool:
        """True if the case has passed with this code, configuration and machine."""
        record = self.cases.get(case.id, {})
        return record.get("status") == PASSED and record.get("key") == self.case_key(case)

    def put(self, case: Case, record: dict[str, Any]) -> None:
        """Store the record of a case and write the file."""
        definition = {
            "stage": case.stage,
            "name": case.name,
            "processes": case.processes,
            "precision": case.precision,
            "key": self.case_key(case),
            **self.key,
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "overrides": {run.name: list(run.overrides) for run in case.runs},
        }
        self.cases[case.id] = {**definition, **record}
        self.write()

    def write(self) -> None:
        """Write the file. Raises UserError when that fails."""
        counts = dict.fromkeys(STATUSES, 0)
        for record in self.cases.values():
            counts[record["status"]] += 1
        content = {"format": FORMAT, **self.key, **self.header, "counts": counts, "cases": self.cases}
        try:
            write_json(self.path, content)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): choose another --output.") from None
