"""The plan of a suite: every run with its overrides and its data, fixed in plan.json before the first run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.sidecar import read_header
from sepllm_train.base import files, parsing
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.secrets import masked_words
from sepllm_train.config.overrides import literal
from sepllm_train.suite.config import SelectionConfig, SuiteSettings
from sepllm_train.training.run_folder import git_state, read_run_json

FILE = "plan.json"
# Keys of plan.json that this module calls otherwise.
STORED = {"variant": "row", "variants": "rows"}


@dataclass(frozen=True)
class PlannedRun:
    """A run: its variant, sequence length (tokens), seed, steps, and what is given to pretrain.py."""

    name: str
    variant: str
    length: int
    seed: int
    steps: int
    overrides: list[str]


@dataclass(frozen=True)
class Plan:
    """The runs of a suite. `data`, `index`, `separators` and `tokenizer` are hashes of what the runs read (older plans
    do not have all); `folder` is the suite's."""

    folder: Path
    suite: str
    size: str
    question: str
    reference: str
    variants: list[str]
    lengths: list[int]
    seeds: list[int]
    tokens_per_step: int
    processes: int
    prefix: str | None
    data: str | None
    tokenizer: str | None
    runs: list[PlannedRun]
    index: str | None = None
    separators: str | None = None

    @property
    def run_root(self) -> Path:
        """Folder of the runs."""
        return self.folder / "runs"

    def selected(self, only: SelectionConfig) -> list[PlannedRun]:
        """The runs of a selection, in the order of the plan."""
        return [
            run
            for run in self.runs
            if (not only.variants or run.variant in only.variants)
            and (not only.lengths or run.length in only.lengths)
            and (not only.seeds or run.seed in only.seeds)
        ]


def folder_of(config: SuiteSettings) -> Path:
    """Folder of the suite."""
    return Path(config.suite.root).expanduser() / f"{config.suite.name}-{config.suite.size}"


def make_plan(config: SuiteSettings, prefix: str | None, *, read: bool = True) -> Plan:
    """The plan of a configuration on the dataset `prefix` (None: the sample corpus), without its hashes unless `read`.

    All variants of one seed come before those of the next, so that a suite that is cut short holds whole comparisons.
    """
    suite, size = config.suite, config.size
    header = None if prefix is None or not read else read_header(prefix)
    runs = [
        PlannedRun(
            name=f"{variant}_{length}_seed{seed}",
            variant=variant,
            length=length,
            seed=seed,
            steps=_steps(config, variant),
            overrides=_overrides(config, variant, length, seed),
        )
        for seed in config.seeds
        for length in config.lengths
        for variant in config.variants
    ]
    return Plan(
        folder=folder_of(config),
        suite=suite.name,
        size=suite.size,
        question=suite.question,
        reference=config.reference,
        variants=list(config.variants),
        lengths=config.lengths,
        seeds=config.seeds,
        tokens_per_step=size.tokens_per_step,
        processes=size.processes,
        prefix=prefix,
        data=None if header is None else header.files[".bin"].sha256,
        index=None if header is None else header.files[".idx"].sha256,
        separators=None if header is None else header.files[".sep.bin"].sha256,
        tokenizer=None if header is None else header.tokenizer.sha256,
        runs=runs,
    )


def _steps(config: SuiteSettings, variant: str) -> int:
    """Steps of a variant's runs."""
    suite, size = config.suite, config.size
    return size.reference_steps if variant == suite.reference and not suite.same_steps else size.steps


def _overrides(config: SuiteSettings, variant: str, length: int, seed: int) -> list[str]:
    """Overrides of one run, but for its name and folder and for where the data are."""
    suite, size = config.suite, config.size
    chosen = [*size.overrides, *suite.overrides, *config.variants[variant]]
    # A group's choice puts back every key of the group: choices come before single keys.
    groups = [override for override in chosen if "." not in override.partition("=")[0]]
    return [
        *groups,
        f"data.sequence_length={length}",
        f"training.steps={_steps(config, variant)}",
        f"training.global_batch={size.tokens_per_step // length}",
        f"training.micro_batch={max(1, size.micro_batch_tokens // length)}",
        f"training.validation_samples={max(1, size.validation_tokens // length)}",
        f"seed={seed}",
        *(override for override in chosen if override not in groups),
    ]


def data_overrides(prefix: str | None) -> list[str]:
    """Overrides that make a run read the suite's data."""
    return [] if prefix is None else ["data=prefixes", f"data.prefixes=[{literal(prefix)}]"]


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file, empty where there is no file. Raises UserError for one that cannot be read."""
    return parsing.read_json(path, "restore or delete it", nan=True) if path.exists() else {}


def finished(plan: Plan, run: PlannedRun) -> bool:
    """True if a run has been trained to its end."""
    return read_run_json(plan.run_root / run.name).get("status") == "finished"


def fix_plan(plan: Plan) -> None:
    """Write plan.json, or check that the one that is there says the same.

    Raises UserError when the suite was begun with another plan: its budget, data and seeds were fixed then.
    """
    path = plan.folder / FILE
    content = _content(plan)
    if not path.exists():
        plan.folder.mkdir(parents=True, exist_ok=True)
        stamp = {"fixed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "git": git_state()}
        files.write_json(path, {**content, **stamp})
        return
    earlier = parsing.read_json(path, "restore it, or choose another suite.root", nan=True)
    for key, value in content.items():
        # Plans of before do not have all hashes of the data.
        if earlier.get(key) != value and (key in earlier or key not in ("index", "separators")):
            what, then, now = _first_difference(key, earlier.get(key), value)
            raise UserError(
                f"{path} was fixed before the first run with {what} {then!r} where it is now {now!r}: choose another "
                "suite.root=, or give the settings that it was begun with (suite.only chooses parts of it)."
            )


def read_plan(folder: Path) -> Plan:
    """The plan of a suite's folder. Raises UserError where there is none."""
    path = folder / FILE
    try:
        content = parsing.read_json(path, "restore it")
        runs = [PlannedRun(variant=run.pop("row"), **run) for run in content.pop("runs")]
        for key in ("fixed", "git"):
            content.pop(key)
        return Plan(folder=folder, prefix=None, variants=content.pop("rows"), runs=runs, **content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the plan of a suite ({first_line(error)}): start it with `sepllm suite`."
        ) from None


def _content(plan: Plan) -> dict[str, Any]:
    """Content of plan.json, which must agree; places on the disk may change. There, a variant is called a row, and
    secrets in overrides are masked."""
    values = {STORED.get(key, key): value for key, value in asdict(plan).items() if key not in ("folder", "prefix")}
    values["runs"] = [{STORED.get(key, key): value for key, value in run.items()} for run in values["runs"]]
    for run in values["runs"]:
        run["overrides"] = masked_words(run["overrides"])
    return values


def _first_difference(key: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """Name of what differs first, and both values."""
    if key != "runs" or not isinstance(then, list):
        return key, then, now
    if len(then) != len(now):
        return "a number of runs of", len(then), len(now)
    old, new = next((a, b) for a, b in zip(then, now, strict=True) if a != b)
    field = next(name for name in new if old.get(name) != new[name])
    if field != "overrides":
        return f"{field} of {new['name']}", old.get(field), new[field]
    return (
        f"overrides of {new['name']}",
        _without(old["overrides"], new["overrides"]),
        _without(new["overrides"], old["overrides"]),
    )


def _without(values: list[str], others: list[str]) -> list[str]:
    return [value for value in values if value not in others]
