"""Cases of the kit for a number of GPUs: short trainings in every layout, and which of them are compared.

A case is one entry of results.json. The runs of a case share a launch; overrides are those of scripts/pretrain.py, in
which {runs} stands for the folder of the runs.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("environment", "layouts", "resume", "kill", "overlap", "scaling", "throughput")
PRECISIONS = ("fp32", "bf16")
GIB = 1 << 30

# Shared by all runs that are compared step by step.
COMPARED = (
    "+experiment=demo_sep",
    "data.workers=0",
    "training.micro_batch=1",
    "training.validation_interval=0",
    "training.validation_samples=0",
    "training.checkpoint_interval=0",
    "logging.interval=1",
    "optim.lr=1e-3",
    "optim.min_lr=1e-4",
    "optim.warmup_steps=0",
    # A rank that waits for another this long hangs: the launch ends and the next case gets a new one.
    "parallel.timeout_seconds=120",
    "training.hang_seconds=120",
)
INTERLEAVED = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
# Layout -> (processes of one replica, overrides). The processes that are left hold replicas.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "data": (1, ()),
    "sharded optimizer": (1, ("parallel.sharded_optimizer=true",)),
    "tensor 2": (2, ("parallel.tensor=2",)),
    "tensor 2, sequence": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "pipeline 2": (2, ("parallel.pipeline=2",)),
    "pipeline 2, interleaved": (2, INTERLEAVED),
    "context 2": (2, ("parallel.context=2",)),
    "tensor 2 x pipeline 2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "tensor 2, sequence x context 2": (4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.context=2")),
    "tensor 2 x sharded optimizer": (4, ("parallel.tensor=2", "parallel.sharded_optimizer=true")),
    "tensor 4, sequence": (4, ("parallel.tensor=4", "parallel.sequence=true")),
    "pipeline 4": (4, ("parallel.pipeline=4",)),
    "context 4": (4, ("parallel.context=4",)),
    "pipeline 2, interleaved x context 2": (4, (*INTERLEAVED, "parallel.context=2")),
    "tensor 2 x pipeline 2 x context 2": (
        8,
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.context=2"),
    ),
    "tensor 8, sequence": (8, ("parallel.tensor=8", "parallel.sequence=true")),
    "context 8": (8, ("parallel.context=8",)),
}
# (layout, precision) that is stopped and resumed in itself.
RESUMED = (
    ("data", "fp32"),
    ("sharded optimizer", "bf16"),
    ("tensor 2, sequence", "bf16"),
    ("pipeline 2, interleaved", "bf16"),
    ("context 2", "bf16"),
    ("tensor 2 x sharded optimizer", "bf16"),
)
# (layout that is stopped, layout that resumes from its checkpoint), in fp32.
CROSSINGS = (("sharded optimizer", "tensor 2, sequence"), ("tensor 2", "pipeline 2, interleaved"))
OVERLAPPED = ("data", "pipeline 2, interleaved")
TIMED = ("data", "tensor 2, sequence", "pipeline 2", "tensor 2 x pipeline 2")
TIMED_LONG = ("data", "context 2", "context 4")
PATTERNS = ("sep", "dense")


@dataclass(frozen=True)
class Scale:
    """Models, lengths and durations of a machine: one for GPUs and one for the rehearsal on CPUs.

    `small` and `timed` are overrides of the models that are compared and timed. `launch_seconds` is what it takes until
    all processes are ready, `train_seconds` one short run inside a launch, `time_seconds` one timed run, `kill_seconds`
    the five launches of the kill case; `slack` times the estimate ends a case that hangs.
    """

    device: str
    small: tuple[str, ...]
    timed: tuple[str, ...]
    micro_tokens: int
    lengths: tuple[int, int]
    steps: int
    rounds: int
    kill_steps: int
    launch_seconds: float
    train_seconds: float
    time_seconds: float
    kill_seconds: float
    slack: float


def gpu_scale(memory_bytes: int, model: str = "pythia160m") -> Scale:
    """Scale of GPUs of which the smallest has that much memory; `model` is timed."""
    large = memory_bytes >= 40 * GIB
    return Scale(
        device="cuda",
        small=("model.layers=8", "model.hidden=512", "model.heads=8", "model.ffn=2048", "data.sequence_length=1024"),
        timed=(f"model={model}", "model.vocabulary=50277", "training.precision=bf16", "training.compile=true"),
        micro_tokens=32768 if large else 8192,
        lengths=(2048, 32768 if large else 8192),
        steps=4,
        rounds=4,
        kill_steps=160,
        launch_seconds=30,
        train_seconds=4,
        time_seconds=16,
        kill_seconds=210,
        slack=12,
    )


def cpu_scale() -> Scale:
    """Scale of a rehearsal: models that a CPU trains in a moment."""
    shape = ("model.layers=4", "model.hidden=64", "model.heads=8", "model.ffn=128", "attention.window=8")
    return Scale(
        device="cpu",
        small=(*shape, "data.sequence_length=64"),
        timed=("model=demo", *shape, "training.precision=fp32", "data.workers=0"),
        micro_tokens=64,
        lengths=(64, 128),
        steps=3,
        rounds=2,
        kill_steps=90,
        launch_seconds=10,
        train_seconds=0.5,
        time_seconds=0.7,
        kill_seconds=60,
        slack=200,
    )


@dataclass(frozen=True)
class RunSpec:
    """One training: its folder below {runs} and overrides. With `digest` its last checkpoint is hashed."""

    name: str
    overrides: tuple[str, ...]
    digest: bool = False


@dataclass(frozen=True)
class Case:
    """One entry of the results.

    `kind`: "environment", "train" (the runs one after another), "time" (in `rounds` interleaved rounds) or "kill".
    `baseline`: name of the case of the same stage to compare with. Of cases that do not fit the budget
    those with the highest `priority` numbers are left out.
    """

    stage: str
    name: str
    kind: str
    processes: int
    runs: tuple[RunSpec, ...]
    seconds: float
    priority: int
    baseline: str | None = None
    rounds: int = 0
    precision: str = "fp32"

    @property
    def id(self) -> str:
        """Stage and name, unique."""
        return f"{self.stage}/{self.name}"

    @property
    def baseline_id(self) -> str | None:
        """Id of the baseline."""
        return None if self.baseline is None else f"{self.stage}/{self.baseline}"


def all_cases(processes: int, scale: Scale) -> list[Case]:
    """Every case of the kit on `processes` GPUs, a power of two, in the order of the stages."""
    return [
        Case("environment", "machine", "environment", processes, (), scale.launch_seconds, 0),
        *layout_cases(processes, scale),
        *resume_cases(processes, scale),
        kill_case(processes, scale),
        *overlap_cases(processes, scale),
        *scaling_cases(processes, scale),
        *throughput_cases(processes, scale),
    ]


def layout_cases(processes: int, scale: Scale) -> list[Case]:
    """One GPU, and every layout that fits, in fp32 and bf16."""
    cases = []
    for number, precision in enumerate(PRECISIONS):
        one = f"one GPU, {precision}"
        variants = [(one, 1, ())] + [(f"{name}, {precision}", processes, own) for name, own in fitting(processes)]
        for name, count, own in variants:
            run = RunSpec("run", (*compared(processes, scale, precision), f"training.steps={scale.steps}", *own))
            baseline = None if count == 1 else one
            cases.append(
                Case("layouts", name, "train", count, (run,), scale.train_seconds, 1 + 3 * number, baseline,
                     precision=precision)
            )  # fmt: skip
    return cases


def resume_cases(processes: int, scale: Scale) -> list[Case]:
    """A run, and another one from its checkpoint halfway: in the same layout, and in others."""
    layouts = dict(fitting(processes))
    half, seconds = scale.steps // 2 + 1, 2.5 * scale.train_seconds
    cases = []

    def pair(name: str, precision: str, first: tuple[str, ...], second: tuple[str, ...], same: bool) -> Case:
        common = (
            *compared(processes, scale, precision),
            f"training.steps={2 * half}",
            f"training.checkpoint_interval={half}",
            "training.deterministic=true",
        )
        checkpoint = f"resume={{runs}}/whole/checkpoints/step_{half:08d}"
        runs = (RunSpec("whole", (*common, *first), same), RunSpec("again", (*common, *second, checkpoint), same))
        return Case("resume", name, "train", processes, runs, seconds, 2, precision=precision)

    for layout, precision in RESUMED:
        if layout in layouts:
            cases.append(pair(f"{layout}, {precision}", precision, layouts[layout], layouts[layout], True))
    for source, target in CROSSINGS:
        cases.append(pair(f"{source} to {target}, fp32", "fp32", layouts[source], layouts[target], False))
    return cases


def kill_case(processes: int, scale: Scale) -> Case:
    """A data-parallel run with a sharded optimizer that is killed, stopped by two signals, and resumed."""
    overrides = (
        *(key for key in compared(processes, scale, "bf16") if not key.startswith("training.checkpoint_interval=")),
        f"training.steps={scale.kill_steps}",
        f"training.checkpoint_interval={scale.kill_steps // 10}",
        "training.deterministic=true",
        "parallel.sharded_optimizer=true",
    )
    run = RunSpec("run", overrides, digest=True)
    return Case("kill", "SIGKILL, SIGTERM, SIGUSR1", "kill", processes, (run,), scale.kill_seconds, 3, precision="bf16")


def overlap_cases(processes: int, scale: Scale) -> list[Case]:
    """Communication during computation off and on: losses, and steps in interleaved rounds."""
    layouts = dict(fitting(processes))
    cases = []
    for layout in OVERLAPPED:
        short = (*compared(processes, scale, "fp32"), f"training.steps={scale.steps}", *layouts[layout])
        timed = timing(processes, scale, scale.lengths[0], 4, "sep", layouts[layout])
        for name, kind, overrides in ((f"losses, {layout}", "train", short), (f"speed, {layout}", "time", timed)):
            runs = tuple(RunSpec(f"overlap_{on}", (*overrides, f"parallel.overlap={on}")) for on in ("false", "true"))
            seconds = 2 * (scale.train_seconds if kind == "train" else scale.time_seconds)
            cases.append(
                Case("overlap", name, kind, processes, runs, seconds, 3 if kind == "train" else 7, rounds=scale.rounds)
            )
    return cases


def scaling_cases(processes: int, scale: Scale) -> list[Case]:
    """Weak scaling of data parallelism: as many micro-batches for each GPU whatever the number of GPUs."""
    cases = []
    for micro_batches, priority in ((4, 5), (1, 9)):
        counts = [count for count in (1 << power for power in range(20)) if count <= processes]
        for count in counts:
            run = RunSpec("run", timing(count, scale, scale.lengths[0], micro_batches, "sep"))
            baseline = scaling_name(1, micro_batches) if count > 1 else None
            # The ends of the curve before its middle.
            rank = priority if count in (1, processes) else priority + 1
            cases.append(
                Case("scaling", scaling_name(count, micro_batches), "time", count, (run,), scale.time_seconds, rank,
                     baseline, scale.rounds, "bf16")
            )  # fmt: skip
    return cases


def scaling_name(count: int, micro_batches: int) -> str:
    """Name of a case of the scaling stage."""
    return f"{count} GPU{'s' * (count > 1)}, {micro_batches} micro-batch{'es' * (micro_batches > 1)} a step"


def throughput_cases(processes: int, scale: Scale) -> list[Case]:
    """Layouts at the same number of GPUs and tokens per step, each model alone so that its memory is known."""
    layouts = dict(fitting(processes))
    cases = []
    for length, names in zip(scale.lengths, (TIMED, TIMED_LONG), strict=True):
        for pattern in PATTERNS:
            for layout in names:
                if layout not in layouts:
                    continue
                run = RunSpec("run", timing(processes, scale, length, 4, pattern, layouts[layout]))
                baseline = None if layout == "data" else f"data, {pattern}, {length} tokens"
                name, priority = f"{layout}, {pattern}, {length} tokens", 6 if pattern == "sep" else 8
                cases.append(
                    Case("throughput", name, "time", processes, (run,), scale.time_seconds, priority, baseline,
                         scale.rounds, "bf16")
                )  # fmt: skip
    return cases


def fitting(processes: int) -> list[tuple[str, tuple[str, ...]]]:
    """(layout, overrides) of those that divide the processes."""
    return [(name, overrides) for name, (needed, overrides) in LAYOUTS.items() if processes % needed == 0]


def compared(processes: int, scale: Scale, precision: str) -> tuple[str, ...]:
    """Overrides of a small run, whose batch every layout of `processes` can split."""
    return (*COMPARED, *scale.small, f"training.global_batch={2 * processes}", f"training.precision={precision}")


def timing(
    processes: int, scale: Scale, length: int, micro_batches: int, pattern: str, layout: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Overrides of a timed run: `micro_batches` micro-batches a step for each process if it is data parallel."""
    micro = max(1, scale.micro_tokens // length)
    return (
        *scale.timed,
        f"attention={pattern}",
        f"data.sequence_length={length}",
        "data.validation_fraction=0.1",  # of the sample corpus, which must hold out a long sequence
        f"training.micro_batch={micro}",
        f"training.global_batch={micro * micro_batches * processes}",
        "parallel.timeout_seconds=240",  # a pipeline stage waits for those before it to compile
        *layout,
    )
