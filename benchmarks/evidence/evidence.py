"""Trains Pythia-160M dense and with separator attention on the same tokens for as many steps as the time allows.

    python benchmarks/evidence/evidence.py --pack PACK --wheels WHEELS --output OUT --seconds 450     # the GPU machine
    python benchmarks/evidence/evidence.py --pack PACK --wheels WHEELS --output OUT --dry             # tiny, on a CPU

1. Installs the wheels from their folder alone; unpacks the validation text and makes its tokens.
2. Starts both patterns for a few steps, which fills the compilers' caches and measures tokens per second, while the
   training text is unpacked and tokenised.
3. Sets the steps, and with them the learning-rate schedule, to what fits the time that is left, the same for both.
4. Trains both through scripts/pretrain.py, validating on the way, and writes losses at equal tokens, seconds, FLOPs.

OUT gets evidence.json, summary.txt and, as they come, dense.jsonl, sep.jsonl and the logs; all else goes to --work.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

PATTERNS = ("dense", "sep")
RESERVE = 8.0  # seconds for the summary
WARM_STEPS = {"dense": 30, "sep": 6}
VALIDATIONS = 30
REAL = [
    "data.sequence_length=2048",
    "training.global_batch=64",
    "training.micro_batch=32",
    "training.validation_samples=64",
]
TINY = [
    "data.sequence_length=256", "training.global_batch=4", "training.micro_batch=2", "training.validation_samples=4",
    "training.precision=fp32", "training.compile=false", "data.workers=0",
    "model.layers=2", "model.hidden=64", "model.heads=2", "model.ffn=128",
]  # fmt: skip
BEGIN = time.monotonic()


def note(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:6.1f} s] {text}", flush=True)


# --- wheels and data


def install(wheels: Path, target: Path) -> None:
    """The wheels, from their folder alone."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--disable-pip-version-check",
    ]
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"no wheels in {wheels}")
    subprocess.run([*command, "--upgrade", "--target", str(target), *files], check=True)


def decode(path: str, digest: str) -> bytes:
    """A block of the pack."""
    import bz3

    block = bz3.decompress(Path(path).read_bytes())
    if hashlib.sha256(block).hexdigest() != digest:
        raise ValueError(f"{path} is damaged")
    return block


def texts(pack: Path, names: list[str], jobs: int) -> Iterator[str]:
    """Documents of some sets of the pack, in order."""
    manifest = json.loads((pack / "manifest.json").read_text())
    entries = [entry for name in names for entry in manifest["sets"].get(name, [])]
    columns = zip(*((str(pack / entry["file"]), entry["sha256"]) for entry in entries), strict=True)
    with ProcessPoolExecutor(max(1, min(jobs, len(entries)))) as pool:
        for block in pool.map(decode, *columns):
            yield from block.decode("utf8").split("\0")[:-1]


def tokenise(pack: Path, names: list[str], prefix: Path, jobs: int, limit: int | None = None) -> int:
    """A data set of the product at `prefix`; its tokens. `limit` documents at most."""
    from data_prep.readers import Document
    from data_prep.tokenize import tokenize_documents
    from data_prep.tokenizers import load_tokenizer
    from data_prep.writer import DatasetWriter

    tokenizer = prefix.parent / "tokenizer.json"
    if not tokenizer.exists():
        tokenizer.write_bytes(lzma.decompress((pack / "tokenizer.json.xz").read_bytes()))
    found = texts(pack, names, jobs)
    documents = (Document(text, "pack", number) for number, text in enumerate(found) if limit is None or number < limit)
    with DatasetWriter(prefix, load_tokenizer(tokenizer), overwrite=True) as writer:
        tokenize_documents(documents, writer, workers=jobs)
        return writer.finish().tokens


# --- runs of the product


class Run:
    """A run of scripts/pretrain.py in a process of its own."""

    def __init__(
        self, options: argparse.Namespace, name: str, pattern: str, data: list[Path], steps: int, every: int
    ) -> None:
        self.steps = steps
        self.folder = options.work / "runs" / name
        self.log = options.output / f"{name}.log"
        shutil.rmtree(self.folder, ignore_errors=True)
        validation = ",".join(str(options.work / "data" / name) for name in ("valid_pg19", "valid_modern"))
        arguments = [
            f"+experiment=pythia160m_{pattern}", f"name={name}", f"run_root={options.work / 'runs'}",
            f"logging.interval={1 if name.startswith('warm') else 5}",
            "data=prefixes", f"data.prefixes=[{','.join(map(str, data))}]", f"data.validation_prefixes=[{validation}]",
            f"data.cache={options.work / 'index'}", f"training.steps={steps}", f"training.validation_interval={every}",
            "training.checkpoint_interval=0", "optim.warmup_fraction=0.05", *(TINY if options.dry else REAL),
            *options.overrides,
        ]  # fmt: skip
        self.began = time.monotonic()
        with open(self.log, "w", encoding="utf8") as log:
            program = [sys.executable, str(options.repository / "scripts/pretrain.py"), *arguments]
            log.write(f"$ {' '.join(program)}\n")
            log.flush()
            self.process = subprocess.Popen(
                program,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=options.work,
                env=options.environment,
                start_new_session=True,
            )
        self.first_step: float | None = None
        threading.Thread(target=self._see_first_step, daemon=True).start()

    def _see_first_step(self) -> None:
        while self.process.poll() is None:
            if self.records():
                self.first_step = time.monotonic() - self.began
                return
            time.sleep(0.1)

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def done(self) -> bool:
        """True when the last step is validated: what follows is a checkpoint that nobody needs."""
        return any(record["step"] == self.steps and "val/loss" in record for record in self.records()[-4:])

    def wait(self, until: float, copy: Path | None = None) -> bool:
        """Wait until the last validation or the given time; end the process; whether it got to the end."""
        while self.process.poll() is None and not self.done() and time.monotonic() < until:
            time.sleep(0.2)
            if copy is not None and (self.folder / "metrics.jsonl").is_file():
                shutil.copy(self.folder / "metrics.jsonl", copy)
        self.end()
        if copy is not None and (self.folder / "metrics.jsonl").is_file():
            shutil.copy(self.folder / "metrics.jsonl", copy)
        return self.done()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tail(self) -> str:
        return self.log.read_text(encoding="utf8", errors="replace")[-1500:]


def measured(run: Run) -> dict[str, float]:
    """Seconds of a step and of a validation, once compiled, and of a start with full caches."""
    records = run.records()
    steps = sorted(record["train/step_seconds"] for record in records if "train/step_seconds" in record)
    validations = [record["val/seconds"] for record in records if "val/seconds" in record]
    compiling = [float(found) for found in re.findall(r"functions in ([\d.]+) s", run.log.read_text(encoding="utf8"))]
    start = (run.first_step or 30.0) - sum(compiling[:1])
    return {
        "step_seconds": statistics.median(steps[: max(1, len(steps) // 2)]),  # the faster half: nothing compiles in it
        "validation_seconds": validations[-1] if validations else 0.5,
        "start_seconds": max(5.0, start) + 0.4 * sum(compiling),
    }


# --- the comparison


def curve(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = (
        "step",
        "tokens",
        "seconds",
        "flops/model",
        "flops/dense",
        "val/loss",
        "val/valid_pg19/loss",
        "val/valid_modern/loss",
    )
    return [{key: record.get(key) for key in kept} for record in records if "val/loss" in record]


def loss_at(points: list[dict[str, Any]], key: str, value: float) -> float | None:
    """Validation loss where a counter reaches a value, between the validations around it."""
    for before, after in itertools.pairwise(points):
        if before[key] <= value <= after[key]:
            share = (value - before[key]) / max(1e-9, after[key] - before[key])
            return before["val/loss"] + share * (after["val/loss"] - before["val/loss"])
    return points[-1]["val/loss"] if points and value >= points[-1][key] else None


def summary(result: dict[str, Any]) -> str:
    """Losses at equal tokens, seconds and FLOPs."""
    curves = {pattern: result.get(pattern, {}).get("curve", []) for pattern in PATTERNS}
    lines = [f"steps {result.get('steps')}, tokens of the data {result.get('tokens')}"]
    for pattern, points in curves.items():
        if points:
            last = points[-1]
            speed = result[pattern].get("tokens_per_second")
            lines.append(
                f"{pattern:5} step {last['step']}: val {last['val/loss']:.4f} (pg19 {last['val/valid_pg19/loss']:.4f}, "
                f"modern {last['val/valid_modern/loss']:.4f}), {last['tokens'] / 1e6:.1f}M tokens, "
                f"{last['seconds']:.1f} s, "
                f"{last['flops/model'] / 1e15:.3f} PFLOP, {speed:,.0f} tokens/s"
            )
    if all(curves.values()):
        dense, sep = (curves[pattern][-1] for pattern in PATTERNS)
        lines.append(
            f"sep over dense: seconds {sep['seconds'] / dense['seconds']:.3f}, FLOPs "
            f"{sep['flops/model'] / dense['flops/model']:.3f}, loss {sep['val/loss'] - dense['val/loss']:+.4f} at "
            "equal tokens"
        )
        for key in ("seconds", "flops/model"):
            value = min(dense[key], sep[key])
            losses = [loss_at(curves[pattern], key, value) for pattern in PATTERNS]
            if None not in losses:
                lines.append(
                    f"at equal {key} ({value:.4g}): dense {losses[0]:.4f}, sep {losses[1]:.4f} (schedules of equal "
                    "tokens: the one cut short has not decayed)"
                )
        lines.append("step: dense / sep validation loss: " + ", ".join(
            f"{a['step']}: {a['val/loss']:.3f}/{b['val/loss']:.3f}" for a, b in zip(*curves.values(), strict=False)
        ))  # fmt: skip
    return "\n".join(lines)


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    (options.output / "evidence.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "summary.txt").write_text(summary(result) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("."))
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="packages, data, caches (default: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=450, help="of everything (%(default)s)")
    parser.add_argument("--most-tokens", type=float, default=100e6, help="of each run (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="a tiny model, a few steps, no GPU")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration of both runs")
    options = parser.parse_intermixed_args()
    deadline = BEGIN + options.seconds - RESERVE
    for name in ("repository", "pack", "wheels", "output"):
        setattr(options, name, getattr(options, name).resolve())
    options.work = (options.work or Path(tempfile.mkdtemp(prefix="evidence-"))).resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.work / "data").mkdir(parents=True, exist_ok=True)
    jobs = max(1, len(os.sched_getaffinity(0)) - 2) if not options.dry else 1
    packages = options.work / "packages"
    install(options.wheels, packages)
    paths = [str(options.repository), str(options.repository / "kernels"), str(packages)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")]))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    options.environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(options.work / "inductor"), "TRITON_CACHE_DIR": str(options.work / "triton"),
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    note(f"wheels installed, {jobs} jobs")
    data = options.work / "data"
    result: dict[str, Any] = {
        "tokens": {},
        "arguments": {key: str(value) for key, value in vars(options).items() if key != "environment"},
    }
    for name in ("valid_pg19", "valid_modern", "warm"):
        result["tokens"][name] = tokenise(options.pack, [name], data / name, jobs, 6 if options.dry else None)
    note(f"tokens: {result['tokens']}")

    # Both patterns compile at once, on a little text of its own: nothing of these two runs is kept but their speed.
    warm_steps = {"dense": 5, "sep": 3} if options.dry else WARM_STEPS
    warm = {}
    for pattern in ("sep", "dense"):
        warm[pattern] = Run(
            options, f"warm_{pattern}", pattern, [data / "warm"], warm_steps[pattern], max(1, warm_steps[pattern] // 3)
        )
    names = ["train_modern"] if options.dry else ["train_modern", "train_books"]
    result["tokens"]["train"] = tokenise(options.pack, names, data / "train", jobs, 60 if options.dry else None)
    note(f"{result['tokens']['train']:,} training tokens")
    for pattern in PATTERNS:
        if not warm[pattern].wait(min(deadline, BEGIN + 0.45 * options.seconds)):
            note(f"warming up {pattern} did not end: {warm[pattern].tail()}")
            if not warm[pattern].records():
                for run in warm.values():
                    run.end()
                write(options, result)
                return 1
        result[f"warm_{pattern}"] = measured(warm[pattern])
        note(f"{pattern}: {json.dumps({key: round(value, 3) for key, value in result[f'warm_{pattern}'].items()})}")

    tokens_per_step = 4 * 256 if options.dry else 64 * 2048
    slow = {
        key: max(result[f"warm_{pattern}"][key] for pattern in PATTERNS)
        for key in ("validation_seconds", "start_seconds")
    }
    steps_seconds = sum(
        min(result[f"warm_{p}"]["step_seconds"], result["warm_dense"]["step_seconds"]) for p in PATTERNS
    )
    left = deadline - time.monotonic()
    training = left - 2 * slow["start_seconds"] - 2 * (VALIDATIONS + 2) * slow["validation_seconds"]
    steps = int(0.96 * training / steps_seconds)
    steps = 6 if options.dry else max(20, min(steps, int(options.most_tokens / tokens_per_step)))
    every = max(1, steps // VALIDATIONS)
    result |= {"steps": steps, "validation_interval": every, "tokens_per_step": tokens_per_step}
    note(
        f"{left:.0f} s are left: {steps} steps of {tokens_per_step:,} tokens each "
        f"({steps * tokens_per_step / 1e6:.1f}M), validation every {every}"
    )
    for number, pattern in enumerate(PATTERNS):
        run = Run(options, pattern, pattern, [data / "train"], steps, every)
        until = deadline if number else time.monotonic() + 0.57 * (deadline - time.monotonic())
        ended = run.wait(until, options.output / f"{pattern}.jsonl")
        records = run.records()
        speeds = [record["train/tokens_per_second"] for record in records if "train/tokens_per_second" in record]
        result[pattern] = {
            "ended": ended, "curve": curve(records), "tokens_per_second": statistics.median(speeds) if speeds else 0.0,
            "first_step_seconds": run.first_step,
        }  # fmt: skip
        write(options, result)
        note(f"{pattern}: {'ended' if ended else 'its time was over: ' + run.tail()}")
    print(summary(result), flush=True)
    return 0 if all(result[pattern]["ended"] for pattern in PATTERNS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
