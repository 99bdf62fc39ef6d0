"""Half an hour with a GPU: correctness, kernel speed, training speed, each in at most eight minutes.

    python scripts/gpu_check.py --output local/gpu --stage 1
    python scripts/gpu_check.py --output local/gpu --stage 2
    python scripts/gpu_check.py --output local/gpu --stage 3 --wheels WHEELS [--data PREFIX]

Runs from the checkout with the machine's own Python and no network. Stages 1 and 2 need torch and Triton alone; stage
3 takes the packages that are missing from the folder --wheels. Without --stage all three run. Results are written to
--output as they come, so that whatever a stage got done before its time was over is there.

1. Kernels against a float64 reference, the same bits twice, CUDA graphs, no recompilation.
2. Kernels beside dense ones and FlexAttention, and the fastest tiles of the device.
3. Tokens per second of dense and separator attention at 160M parameters, and a short pair of runs of both.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from sepllm_train.base.errors import UserError  # noqa: E402 - needs the path above where nothing is installed
from sepllm_train.base.files import write_json  # noqa: E402
from sepllm_train.distributed.processes import logged_process  # noqa: E402

STAGE_SECONDS = 480
# Module -> what pip calls it. sentencepiece makes the sample corpus; matplotlib draws the comparison.
PACKAGES = {
    "megatron": "megatron-core>=0.16.1,<0.20",
    "hydra": "hydra-core>=1.3.2,<1.4",
    "omegaconf": "omegaconf>=2.3",
    "antlr4": "antlr4-python3-runtime",
    "yaml": "PyYAML",
    "packaging": "packaging",
    "numpy": "numpy",
    "psutil": "psutil",
    "tqdm": "tqdm",
    "setuptools": "setuptools",
}
SAMPLE_PACKAGES = {"sentencepiece": "sentencepiece"}
THROUGHPUT_LENGTHS = (2048, 8192, 32768)
TOKENS_PER_STEP = 65536
MICRO_BATCHES = 4  # of a timed step
COMPILED = "training.compile=true"
TINY_BENCHMARK = (
    *("--model", "demo", "--rounds", 2, "--steps", 1, "model.layers=2", "model.hidden=128", "model.heads=2"),
    *("model.ffn=256", "data.sample_vocabulary=4096", "data.workers=0"),
)
VOCABULARY = 50277
PATTERNS = ("dense", "sep")


class Stage:
    """The time and the environment that the programs of a stage share; on CPU its kernels may be interpreted."""

    def __init__(self, options: argparse.Namespace, *, interpret: bool = False) -> None:
        self.output = options.output.resolve()
        self.deadline = time.monotonic() + STAGE_SECONDS
        self.packages = self.output / "packages"
        paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(self.packages), os.environ.get("PYTHONPATH", "")]
        # The packages of a stage are fewer than setup.py asks for: its programs are not to refuse that.
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "SEPLLM_ANY_VERSION": "1",
        }
        if options.device == "cpu":
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": str(int(interpret))}

    @property
    def seconds_left(self) -> float:
        """Seconds until the stage must be over."""
        return max(0.0, self.deadline - time.monotonic())

    def run(self, name: str, *arguments: object, seconds: float | None = None) -> int | None:
        """Runs this Python on a program, its output to NAME.log; the exit code, or None when its time was over."""
        limit = self.seconds_left if seconds is None else min(seconds, self.seconds_left)
        if limit < 1:
            print(f"{name}: no time left", flush=True)
            return None
        command = [sys.executable, *map(str, arguments)]
        begin = time.monotonic()
        log = self.output / f"{name}.log"
        with logged_process(command, log, environment=self.environment, folder=self.output) as process:
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
        verdict = "its time was over" if code is None else "done" if code == 0 else f"exit code {code}"
        print(f"{name}: {verdict} after {time.monotonic() - begin:.0f} s, see {name}.log", flush=True)
        return code


def correctness(options: argparse.Namespace) -> bool:
    """Stage 1; whether every case passed."""
    stage = Stage(options, interpret=True)
    jobs = 1 if options.device == "cpu" else max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    limits = ("--minutes", STAGE_SECONDS / 60 - 1, "--jobs", jobs)
    arguments = ("--output", stage.output, "--device", options.device, *limits)
    return stage.run("correctness", "-m", "benchmarks.attention.correctness", *arguments) == 0


def kernels(options: argparse.Namespace) -> bool:
    """Stage 2: dense baselines at every length, FlexAttention at the lengths with a bar, then tuning."""
    stage = Stage(options, interpret=True)
    program = ("-m", "benchmarks.attention.gpu", "--output")
    if options.device == "cpu":
        small = ("--device", "cpu", "--tokens", 48, "--hidden", 32, "--lengths", 48, "--windows", 8)
        cell = ("--head-sizes", 32, "--groups", 1, "--sources", "text")
        code = stage.run("kernels", *program, _fresh(stage, "cpu"), *small, *cell)
        return code == 0
    shape = ("--windows", 128, "--groups", 1, "--sources", "text", "12%")
    dense = ("--lengths", 2048, 4096, 8192, 16384, 32768, "--baselines", "cudnn", "flash sdpa")
    packages = ("flash-attn 2", "flash-attn 3", "flash-attn 4")
    flex = ("--lengths", 2048, 8192, "--baselines", "flex", "flex gathered")
    codes = [
        stage.run("kernels-dense", *program, _fresh(stage, "dense"), *shape, *dense, *packages, seconds=130),
        stage.run("kernels-flex", *program, _fresh(stage, "flex"), *shape, *flex, seconds=180),
    ]
    minutes = max(0.5, stage.seconds_left / 60 - 1)
    tuned = ("--keep-table", "--minutes", minutes, "--output", stage.output / "tuning.json")
    codes.append(stage.run("tuning", "-m", "benchmarks.attention.tune", *tuned))
    # A benchmark whose time was over has still written what it measured.
    return not any(codes)


def _fresh(stage: Stage, name: str) -> Path:
    """Name of a result file that benchmarks/attention/draw.py finds once it is copied to results/gpu."""
    return stage.output / f"attention-{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def training(options: argparse.Namespace) -> bool:
    """Stage 3; writes training.json."""
    stage = Stage(options)
    install_missing(stage, options)
    throughput: list[dict[str, Any]] = []
    results: dict[str, object] = {"device": options.device, "tiny": options.tiny, "throughput": throughput}
    good = True
    for length in (256,) if options.tiny else THROUGHPUT_LENGTHS:
        row = _throughput(stage, options, length)
        good &= row is not None
        throughput.append(row or {"length": length})
        write_json(stage.output / "training.json", results)
    results["loss"], finished = _loss_pair(stage, options, throughput)
    write_json(stage.output / "training.json", results)
    return good and finished


def install_missing(stage: Stage, options: argparse.Namespace) -> None:
    """Puts the packages that this Python lacks into the output folder, from --wheels. Raises UserError."""
    wanted = PACKAGES if options.data else PACKAGES | SAMPLE_PACKAGES
    found = [str(stage.packages), *sys.path]
    missing = [
        name for module, name in wanted.items() if importlib.machinery.PathFinder.find_spec(module, found) is None
    ]
    if not missing:
        return
    if options.wheels is None:
        raise UserError(f"Stage 3 needs {', '.join(missing)}: give a folder with their wheels to --wheels.")
    if not options.wheels.is_dir():
        raise UserError(f"--wheels {options.wheels} is not a folder: put wheels of {', '.join(missing)} there.")
    flags = ("--no-index", "--no-deps", "--no-build-isolation", "--upgrade", "--target", stage.packages)
    code = stage.run("pip", "-m", "pip", "install", *flags, "--find-links", options.wheels.resolve(), *missing)
    if code != 0:
        raise UserError(
            f"pip could not install {', '.join(missing)} from {options.wheels}: see {stage.output}/pip.log."
        )


def _throughput(stage: Stage, options: argparse.Namespace, length: int) -> dict[str, Any] | None:
    """Figures of benchmarks/training.py, dense and separator training in interleaved rounds; None when it failed.

    `dense` and `sep` are tokens per second, `ratio` the median of the rounds' ratios.
    """
    result = stage.output / f"throughput-{length}.json"
    result.unlink(missing_ok=True)
    arguments: list[object] = ["--output", result, "--lengths", length, *TINY_BENCHMARK]
    if not options.tiny:
        arguments = ["--output", result, "--lengths", length, "--model", "pythia160m", "--rounds", 4, "--steps", 1]
        arguments += ["--micro-tokens", TOKENS_PER_STEP, "--step-tokens", MICRO_BATCHES * TOKENS_PER_STEP, COMPILED]
    if options.data:
        arguments += ["--data", options.data.resolve()]
    share = stage.seconds_left / (len(THROUGHPUT_LENGTHS) + 1)
    limit = None if options.tiny else 1.5 * share
    if stage.run(f"throughput-{length}", "-m", "benchmarks.training", *arguments, seconds=limit) != 0:
        return None
    (figures,) = json.loads(result.read_text(encoding="utf8"))["results"]
    if "failure" in figures:
        return None
    dense, sep = (figures[pattern]["tokens_per_second"] for pattern in PATTERNS)
    print(f"S={length}: dense {dense:,.0f}, sep {sep:,.0f} tokens/s, ratio {figures['ratio']:.2f}", flush=True)
    return {"length": length, "dense": dense, "sep": sep, "ratio": figures["ratio"], "figures": figures}


def _loss_pair(
    stage: Stage, options: argparse.Namespace, throughput: list[dict[str, Any]]
) -> tuple[dict[str, list[dict[str, float]]], bool]:
    """Validation records of a dense and a separator run of as many steps as fit the time, and whether both ended."""
    steps = 4
    if not options.tiny:
        seen = [row["figures"]["dense"]["step_seconds"] for row in throughput if "figures" in row]
        seconds = seen[0] / MICRO_BATCHES if seen else 1.0
        # A third of the time goes to starting, validating and saving twice.
        steps = max(10, int(stage.seconds_left / 3 / seconds))
    if options.tiny:
        shape: tuple[str, ...] = ("data.sequence_length=256", "training.global_batch=2", "training.micro_batch=1")
    else:
        sequences = TOKENS_PER_STEP // 2048
        shape = (f"training.global_batch={sequences}", f"training.micro_batch={sequences}", COMPILED)
    every = max(1, steps // 8)
    overrides = (*shape, f"training.steps={steps}", f"training.validation_interval={every}")
    pair, finished = {}, True
    for number, pattern in enumerate(PATTERNS):
        share = stage.seconds_left / (len(PATTERNS) - number)
        name = f"loss-{pattern}"
        samples = "training.validation_samples=4" if options.tiny else "training.validation_samples=64"
        records = _pretrain(
            stage, options, name, pattern, *overrides, samples, "optim.warmup_fraction=0.1", seconds=share
        )
        kept = ("step", "tokens", "seconds", "flops/model", "flops/dense", "val/loss")
        pair[pattern] = [{key: record[key] for key in kept} for record in records if "val/loss" in record]
        finished &= bool(records) and records[-1]["step"] == steps
    if finished and importlib.util.find_spec("matplotlib") is not None:
        runs = [stage.output / "runs" / f"loss-{pattern}" for pattern in PATTERNS]
        stage.run("compare", "-m", "sepllm_train", "compare", *runs, "--output", stage.output / "comparison")
    return pair, finished


def _pretrain(
    stage: Stage, options: argparse.Namespace, name: str, pattern: str, *overrides: str, seconds: float | None
) -> list[dict[str, float]]:
    """Records of a training run, from its metrics.jsonl."""
    experiment = f"demo_{pattern}" if options.tiny else f"pythia160m_{pattern}"
    shutil.rmtree(stage.output / "runs" / name, ignore_errors=True)
    arguments = [f"+experiment={experiment}", f"name={name}", "run_root=runs", "logging.interval=1"]
    arguments.append("training.checkpoint_interval=0")
    if options.tiny:
        arguments += ["model.layers=2", "model.hidden=128", "model.heads=2", "model.ffn=256", "data.workers=0"]
    elif options.data is None:
        arguments.append(f"model.vocabulary={VOCABULARY}")
    if options.data:
        arguments += ["data=prefixes", f"data.prefixes=[{options.data.resolve()}]"]
    program = REPOSITORY / "scripts" / "pretrain.py"
    stage.run(name, program, *arguments, *overrides, seconds=seconds)
    shutil.rmtree(stage.output / "runs" / name / "checkpoints", ignore_errors=True)  # gigabytes nobody resumes from
    return _records(stage.output / "runs" / name)


def _records(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


STAGES = {1: correctness, 2: kernels, 3: training}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages asked for; 1 when one did not end well, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of all results")
    parser.add_argument("--stage", type=int, choices=tuple(STAGES), help="this one alone")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages this Python lacks")
    parser.add_argument("--data", type=Path, metavar="PREFIX", help="prepared data set (default: the sample corpus)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the programs in small")
    parser.add_argument("--tiny", action="store_true", help="stage 3 with models and lengths a CPU trains in seconds")
    options = parser.parse_args(arguments)
    try:
        if options.device == "cpu" and options.stage in (None, 3) and not options.tiny:
            raise UserError("Stage 3 trains 160M parameters: on --device cpu add --tiny.")
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot write to --output {options.output}: {error.strerror}.") from None
        good = [STAGES[stage](options) for stage in ([options.stage] if options.stage else STAGES)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
