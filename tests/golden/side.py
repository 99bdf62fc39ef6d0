"""One case in one tree: run what the case asks for with the code of that tree, and write what came out as JSON.

    python side.py TREE JOB.json RESULT.json

`sides.py` starts it, under torchrun for several ranks, with nothing but TREE and TREE/kernels on PYTHONPATH and outside
of both trees. It imports nothing of this folder, so that it runs with trees that do not have it.

GENERATIONS is the one place that knows how a tree is used. Work that renames programs or moves modules adds an entry
for the new trees and leaves those of the old ones.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import io
import json
import os
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Generation:
    """Programs and modules of the trees of one layout.

    Attributes:
        mark: a file that these trees have and older ones do not.
        programs: for each command the words that start it: a script below the tree, or `-m`, a module and words.
        names: for each name that the cases use, `module:attribute`, where the attribute may be of a class.
        packages: what must be imported from the tree.
        token_pattern: attribute of an opened run with its pattern in terms of token ids.
    """

    mark: str
    programs: dict[str, tuple[str, ...]]
    names: dict[str, str]
    packages: tuple[str, ...]
    token_pattern: str = "pattern"


# The newest first.
GENERATIONS = (
    Generation(
        mark="sepllm_train/cli/main.py",
        programs={
            "prepare_data": ("-m", "sepllm_train", "prepare"),
            "pretrain": ("-m", "sepllm_train", "pretrain"),
            "export": ("-m", "sepllm_train", "export"),
            "generate": ("-m", "sepllm_train", "generate"),
            "compare": ("-m", "sepllm_train", "compare"),
            "evaluate": ("-m", "sepllm_train", "evaluate"),
            "suite": ("-m", "sepllm_train", "suite"),
        },
        names={
            "NativeCache": "sepllm_train.generation.native:NativeCache",
            "PatternCache": "sepllm_train.hf:PatternCache",
            "SepCache": "sepllm_train.hf:SepCache",
            "CacheChoice": "sepllm_train.generation.choice:AttentionChoice",
            "alone": "sepllm_train.distributed.launch:alone",
            "build_datasets": "sepllm_train.data.splits:build_datasets",
            "cache_argument": "sepllm_train.hf:cache_argument",
            "config_folder": "sepllm_train.config.load:config_folder",
            "config_for": "sepllm_train.runs.open:config_for",
            "configuration_of": "sepllm_train.config.load:configuration_of",
            "digest": "sepllm_train.training.checkpoint:digest",
            "digests": "sepllm_train.training.checkpoint:digests",
            "load_model": "sepllm_train.hf:load_model",
            "load_run": "sepllm_train.runs.open:TrainedRun.load_model",
            "open_corpus": "sepllm_train.data.corpus:open_corpus",
            "open_source": "sepllm_train.runs.open:open_run",
            "read_config": "sepllm_train.runs.open:read_config",
        },
        packages=("sepllm_train", "data_prep", "sep_attention"),
        token_pattern="token_pattern",
    ),
    Generation(
        mark="scripts/pretrain.py",
        programs={
            "prepare_data": ("scripts/prepare_data.py",),
            "pretrain": ("scripts/pretrain.py",),
            "export": ("scripts/export_hf.py",),
            "generate": ("scripts/generate.py",),
            "compare": ("scripts/compare_runs.py",),
            "evaluate": ("scripts/evaluate.py",),
            "suite": ("scripts/suite.py",),
        },
        names={
            "NativeCache": "sepllm_train.inference.native:NativeCache",
            "PatternCache": "sepllm_train.hf:PatternCache",
            "SepCache": "sepllm_train.hf:SepCache",
            "CacheChoice": "sepllm_train.inference.choice:CacheChoice",
            "alone": "sepllm_train.analysis.runs:alone",
            "build_datasets": "sepllm_train.data.splits:build_datasets",
            "cache_argument": "sepllm_train.hf:cache_argument",
            "config_folder": "sepllm_train.config.load:config_folder",
            "config_for": "sepllm_train.inference.opened:config_for",
            "configuration_of": "sepllm_train.config.load:configuration_of",
            "digest": "sepllm_train.training.checkpoint:digest",
            "digests": "sepllm_train.training.checkpoint:digests",
            "load_model": "sepllm_train.hf:load_model",
            "load_run": "sepllm_train.inference.opened:load_run",
            "open_corpus": "sepllm_train.data.corpus:open_corpus",
            "open_source": "sepllm_train.inference.source:open_source",
            "read_config": "sepllm_train.analysis.runs:read_config",
        },
        packages=("sepllm_train", "data_prep", "sep_attention"),
    ),
)
# What a step or a validation writes that depends on the run alone, and not on the machine's clock or memory.
RECORDED = ("step", "tokens", "flops/", "train/loss", "train/grad_norm", "train/lr", "train/attended_share",
            "train/window", "train/context_bytes", "val/")  # fmt: skip
SECONDS = "seconds"
Job = dict[str, Any]
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Tree:
    """A checkout and the way it is used."""

    folder: Path
    generation: Generation

    @classmethod
    def at(cls, folder: Path) -> Tree:
        """The tree in `folder`. Raises RuntimeError unless all code and configurations are imported from it."""
        found = next((one for one in GENERATIONS if (folder / one.mark).exists()), None)
        if found is None:
            raise RuntimeError(f"{folder} has none of {', '.join(one.mark for one in GENERATIONS)}")
        tree = cls(folder, found)
        for name in found.packages:
            tree.check(name, importlib.import_module(name).__file__)
        tree.check("the configurations", tree.get("config_folder")())
        return tree

    def check(self, what: str, path: Any) -> None:
        """Raise RuntimeError unless `path` lies in this tree."""
        if path is None or not Path(path).resolve().is_relative_to(self.folder):
            raise RuntimeError(f"{what} come from {path}, not from {self.folder}")

    def get(self, name: str) -> Any:
        """Object that this tree calls `name`."""
        module, _, attribute = self.generation.names[name].partition(":")
        return attrgetter(attribute)(importlib.import_module(module))

    def run(self, program: str, *arguments: str) -> str:
        """Run a program of the tree in this process and return what it printed to stdout.

        Raises RuntimeError when it ends with another code than 0.
        """
        first, *rest = self.generation.programs[program]
        module = rest[0] if first == "-m" else None
        path = module or str(self.folder / first)
        printed = io.StringIO()
        sys.argv = [path, *rest[1:], *arguments]
        before = sys.path[:]
        if module is None:
            # As the interpreter does for a script: its folder comes first.
            sys.path.insert(0, str(Path(path).parent))
        try:
            with contextlib.redirect_stdout(printed):
                if module is not None:
                    runpy.run_module(module, run_name="__main__")
                else:
                    runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{program} ended with {end.code}: {printed.getvalue()[-2000:]}") from None
        finally:
            sys.path[:] = before
            sys.stderr.write(printed.getvalue())
        return printed.getvalue()


def train(tree: Tree, job: Job) -> Outcome:
    """A training run: what each step and validation recorded, and the tensors and counters of its last checkpoint."""
    tree.run("pretrain", *job["arguments"])
    if os.environ.get("RANK", "0") != "0":
        return {}
    run = Path("runs") / job["name"]
    lines = (run / "metrics.jsonl").read_text(encoding="utf8").splitlines()
    return {
        "records": [recorded(json.loads(line)) for line in lines],
        "digest": tree.get("digest")(run),
        "tensors": dict(tree.get("digests")(run)),
    }


def recorded(record: dict[str, Any]) -> dict[str, Any]:
    """The values of a record that do not depend on the machine."""
    return {key: value for key, value in record.items() if key.startswith(RECORDED) and not key.endswith(SECONDS)}


def data_order(tree: Tree, job: Job) -> Outcome:
    """The samples of the first global batches, over more than one epoch, and all samples that are validated on."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        config = tree.get("configuration_of")(job["arguments"])
        dataset, validation = tree.get("build_datasets")(config, tree.get("open_corpus")(config.data))
        batch = config.training.global_batch
        return {
            "batches": {
                f"batch {number}": [sample_hash(dataset[number * batch + n]) for n in range(batch)]
                for number in range(job["batches"])
            },
            "validation": {name: [sample_hash(one[n]) for n in range(len(one))] for name, one in validation.items()},
        }
    finally:
        dist.destroy_process_group()


def sample_hash(sample: dict[str, Any]) -> str:
    """SHA-256 of the tensors of a sample."""
    found = hashlib.sha256()
    for key in sorted(sample):
        if hasattr(sample[key], "numpy"):
            found.update(f"{key} {sample[key].dtype} ".encode() + sample[key].contiguous().numpy().tobytes())
    return found.hexdigest()


def export(tree: Tree, job: Job) -> Outcome:
    """The bytes of every file of an export; versions of packages in JSON files are the environment's on both sides."""
    output = Path("models") / job["name"]
    tree.run("export", f"runs/{job['run']}", str(output), *job["arguments"])
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {"files": {str(path.relative_to(output)): file_hash(path) for path in files}}


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def native_cache(tree: Tree, job: Job) -> Outcome:
    """Greedy generation from a run: the texts that the program prints, and the logits of each cache."""
    import torch

    run = Path("runs") / job["run"]
    texts, logits = {}, {}
    for name, options in job["caches"].items():
        words = [word for prompt in job["prompts"] for word in ("--prompt", prompt)]
        words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        printed = tree.run("generate", str(run), "--json", "--tokens", str(job["tokens"]), *words)
        lines = [json.loads(line) for line in printed.splitlines()]
        texts[name] = [{key: line[key] for key in line if key != "tokens_per_second"} for line in lines]
    source = tree.get("open_source")(run)
    pattern = getattr(source, tree.generation.token_pattern)
    config = tree.get("config_for")(tree.get("read_config")(run), 1, 1)
    with tree.get("alone")(config) as device, torch.no_grad():
        model = tree.get("load_run")(source, config, device)
        ids = torch.tensor(source.tokenizer.encode_batch(job["prompts"][:1]), device=device)
        for name, options in job["caches"].items():
            sizes = {key: value for key, value in options.items() if key != "cache"}
            chosen = tree.get("CacheChoice")(options["cache"], **sizes).resolve(pattern, source.tokenizer)
            cache = tree.get("NativeCache")(model, chosen.pattern, chosen.policies, 1, positions=chosen.positions)
            logits[name] = greedy(ids, job["tokens"], cache.feed)
    return {"texts": texts, "logits": logits}


def transformers_cache(tree: Tree, job: Job) -> Outcome:
    """Greedy generation from an exported model with the caches for transformers: logits of each step."""
    import torch

    model = tree.get("load_model")(f"models/{job['model']}")
    ids = torch.tensor([job["ids"]])
    logits = {}
    with torch.no_grad():
        for name, options in job["caches"].items():
            sizes = {key: value for key, value in options.items() if key != "class"}
            given = {tree.get("cache_argument")(model): tree.get(options["class"])(model, **sizes)}
            logits[name] = greedy(ids, job["tokens"], partial(last_logits, model, given))
        return {"logits": logits, "pattern as a mask": tensor_hash(model(ids).logits)}


def last_logits(model: Any, given: dict[str, Any], ids: Any) -> Any:
    """Logits after the last of ids i64 [1, N] of a transformers model with its cache, fp32 [1, vocabulary]."""
    return model(ids, **given).logits[:, -1]


def greedy(ids: Any, count: int, feed: Callable[[Any], Any]) -> Outcome:
    """Feed ids i64 [1, N] and then the likeliest token, `count` times; gives the tokens and the hash of the logits of
    each step."""
    tokens, hashes = [], []
    for _ in range(count):
        logits = feed(ids)
        hashes.append(tensor_hash(logits))
        ids = logits.argmax(-1, keepdim=True)
        tokens.append(int(ids))
    return {"tokens": tokens, "steps": hashes}


def tensor_hash(tensor: Any) -> str:
    """SHA-256 of dtype, shape and values."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.float().contiguous().numpy().tobytes()).hexdigest()


def comparison(tree: Tree, job: Job) -> Outcome:
    """The CSV of a comparison of runs, without the seconds."""
    tree.run("compare", *(f"runs/{run}" for run in job["runs"]), "--output", "comparison")
    return {"curves": table(Path("comparison/curves.csv"))}


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file as they are written, without columns of seconds."""
    with path.open(newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if not key.endswith(SECONDS)} for row in rows]


def evaluation(tree: Tree, job: Job) -> Outcome:
    """Results of the evaluation of a run, without times, versions and what describes the machine."""
    tree.run("evaluate", f"runs/{job['run']}", "--output", "evaluation", *job["arguments"])
    files = sorted(Path("evaluation").glob("*.json"))
    return {path.stem: without_machine(json.loads(path.read_text(encoding="utf8"))) for path in files}


def suite_plan(tree: Tree, job: Job) -> Outcome:
    """Plan of a suite's dry run: the overrides of its runs, without the program that they are given to."""
    printed = tree.run("suite", *job["arguments"], "suite.dry_run=true")
    commands = [shlex.split(line) for line in printed.splitlines() if "=" in line]
    return {"runs": [" ".join(word for word in words if "=" in word) for words in commands]}


def suite(tree: Tree, job: Job) -> Outcome:
    """A small suite, trained, evaluated and reported: its plan, losses and figures without seconds."""
    tree.run("suite", *job["arguments"])
    (folder,) = Path("suites").iterdir()
    for run in (folder / "runs").iterdir():
        started = json.loads((run / "environment.json").read_text(encoding="utf8"))["command"][0]
        # `sepllm pretrain` is of the package that is found first, which Tree.at checks.
        if os.sep in started:
            tree.check(f"the program of {run.name}", started)
    outcome = {
        name: without_machine(json.loads((folder / f"{name}.json").read_text(encoding="utf8")))
        for name in ("plan", "evaluations", "shares")
    }
    return outcome | {str(path.parent.name): table(path) for path in sorted(folder.glob("report/*/curves.csv"))}


# Keys of results that describe the time, the machine or the commit.
_MACHINE = {"environment", "versions", "started", "fixed", "git"}


def without_machine(value: Any) -> Any:
    """JSON without what depends on the clock, the machine or the commit."""
    if isinstance(value, dict):
        return {k: without_machine(v) for k, v in value.items() if k not in _MACHINE and not k.endswith(SECONDS)}
    return [without_machine(one) for one in value] if isinstance(value, list) else value


KINDS: dict[str, Callable[[Tree, Job], Outcome]] = {
    "train": train,
    "data_order": data_order,
    "export": export,
    "native_cache": native_cache,
    "transformers_cache": transformers_cache,
    "comparison": comparison,
    "evaluation": evaluation,
    "suite_plan": suite_plan,
    "suite": suite,
}


def main(folder: str, job_file: str, result_file: str) -> None:
    """Run a job and write its outcome, on the first rank alone."""
    job = json.loads(Path(job_file).read_text(encoding="utf8"))
    outcome = KINDS[job["kind"]](Tree.at(Path(folder).resolve()), job)
    if os.environ.get("RANK", "0") == "0":
        # Each side has a folder of its own: suites record where their data is.
        text = json.dumps(outcome, indent=1).replace(f"{Path.cwd()}{os.sep}", "")
        Path(result_file).write_text(text, encoding="utf8")


if __name__ == "__main__":
    main(*sys.argv[1:])
