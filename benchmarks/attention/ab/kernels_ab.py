"""A/B of the attention kernels on one GPU, in a fixed time: shipped, with switches P1-P4, TMA, Gluon, beside cuDNN.

    python benchmarks/attention/ab/kernels_ab.py prepare --output local/ab    # in the checkout; no GPU
    python local/ab/kernels_ab.py compile --input local/ab                    # there too, with the GPU machine's Triton
    python local/ab/kernels_ab.py run --output OUT --seconds 280              # on the GPU machine
    TRITON_INTERPRET=1 python local/ab/kernels_ab.py run --output OUT --dry   # every code path, tiny, on a CPU

`prepare` copies kernels/sep_attention of --base under one import name for each variant (switches.patch applied, its
four switches set) and the working tree's kernels as `head`; none of them is edited in place. `run` does the most
informative measurements first, appends each to OUT/kernels_ab.jsonl at once, restarts its worker when a kernel crashes
or hangs, and prints a summary and the decision. A second `run` with the same OUT resumes where the first one stopped.
The folder works by itself: it needs torch, NumPy and Triton, and nothing of the project is installed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = "kernels/sep_attention"
SEPARATORS = HERE.parent / "separators.npz"
# Variant -> TOGETHER, AHEAD, SPLIT, CARRIED of switches.patch; None is the code as it is.
VARIANTS: dict[str, tuple[int, bool, bool, bool] | None] = {
    "shipped": None,
    "p1": (8, False, False, False),
    "p2": (1, True, False, False),
    "p3": (1, False, True, False),
    "p23": (1, True, True, False),
    "p123": (8, True, True, False),
    "p4": (1, False, False, True),
    "p1234": (8, True, True, True),
}
BOUND = {"forward": "p123", "backward_q": "p123", "backward_kv": "p1234"}
# (queries, keys, warps, stages, registers); the first of each is the shipped one.
TILES: dict[tuple[str, int], list[tuple[Any, ...]]] = {
    ("forward", 64): [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3, 128)],
    ("forward", 128): [(128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)],
    ("backward_q", 64): [(128, 64, 8, 2, 128), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3, 128)],
    ("backward_q", 128): [(128, 32, 8, 2, 128), (64, 64, 4, 3), (128, 32, 8, 3, 128), (64, 32, 4, 3)],
    # The carried counters take 176 registers, two programs a multiprocessor; with 168 there are three.
    ("backward_kv", 64): [(32, 64, 4, 3), (32, 64, 4, 3, 168), (64, 64, 4, 3), (64, 64, 4, 4)],
    ("backward_kv", 128): [(32, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3)],
}
KERNELS = ("forward", "backward_q", "backward_kv")
ON_SHIPPED_TILE = {
    "forward": ("shipped", "p123", "p1", "p2", "p3", "p23"),
    "backward_q": ("shipped", "p123", "p1", "p2", "p3", "p23"),
    "backward_kv": ("shipped", "p1", "p4", "p1234"),
}
ON_OTHER_TILES = {
    "forward": ("shipped", "p123"),
    "backward_q": ("shipped", "p123"),
    "backward_kv": ("shipped", "p1", "p1234"),
}
BARS = {
    64: {2048: 1.8, 4096: 2.6, 8192: 3.6, 16384: 4.6, 32768: 6.0},
    128: {2048: 1.6, 4096: 2.25, 8192: 3.1, 16384: 4.0, 32768: 5.3},
}
DECIDING = (2048, 32768)  # a change is kept where it wins at both
MARGIN = 0.02  # less is noise
LOSS = 0.01
TOLERANCE = {"bf16": 6e-3, "fp32": 1e-4}
HANG_SECONDS = 60.0
FLUSH_BYTES = 256 * 2**20
PER_CALL = 40


class Scale(NamedTuple):
    """Sizes of a run: the real one or the dry one."""

    lengths: tuple[int, ...]
    checked: tuple[int, ...]
    head_sizes: tuple[int, ...]
    tokens: int
    hidden: int
    window: int
    calls: int


REAL = Scale((2048, 32768, 8192, 16384), (2048, 8192), (64, 128), 16384, 2048, 128, PER_CALL)
DRY = Scale((64, 96), (70,), (32,), 128, 64, 16, 1)


# --- prepare: copies of the package under other names


def prepare(options: argparse.Namespace) -> int:
    """Write AB/variants, the separators, and copies of what `run` needs."""
    output = options.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    (output / "variants").mkdir(parents=True)
    for path in (HERE / "kernels_ab.py", HERE / "dkv_tma.py", HERE / "gluon_fwd.py", SEPARATORS):
        shutil.copy(path, output)
    with tempfile.TemporaryDirectory() as folder:
        plain, patched = Path(folder, "plain"), Path(folder, "patched")
        plain.mkdir()
        archive = subprocess.run(
            ["git", "-C", str(options.repository), "archive", options.base, PACKAGE],
            capture_output=True,
            check=True,
        )
        subprocess.run(["tar", "-x", "-C", str(plain)], input=archive.stdout, check=True)
        shutil.copytree(plain, patched)
        subprocess.run(["patch", "-s", "-p1", "-i", str(HERE / "switches.patch")], cwd=patched, check=True)
        for name, switches in VARIANTS.items():
            copy_package(
                (plain if switches is None else patched) / PACKAGE, output / "variants" / f"sep_{name}", switches
            )
        copy_package(options.repository.resolve() / PACKAGE, output / "variants" / "sep_head", None)
    print(f"{output}: {', '.join(sorted(path.name for path in (output / 'variants').iterdir()))}")
    return 0


def copy_package(source: Path, target: Path, switches: tuple[int, bool, bool, bool] | None) -> None:
    """The package under the name of the target folder, with its switches set."""
    for path in source.rglob("*.py"):
        text = re.sub(r"\bsep_attention\b", target.name, path.read_text(encoding="utf8"))
        # The public op keeps its function's name; only modules and registered names change.
        if switches is not None and path.name == "triton_tiles.py":
            for name, value in zip(("TOGETHER", "AHEAD", "SPLIT", "CARRIED"), switches, strict=True):
                text, found = re.subn(
                    rf"^{name} = tl\.constexpr\(.*\)$", f"{name} = tl.constexpr({value})", text, flags=re.M
                )
                if found != 1:
                    raise SystemExit(f"{path}: no switch {name}")
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf8")


# --- what is launched


class Recorded(NamedTuple):
    """A launch that was caught in place of being made."""

    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        return self.function[self.grid](*self.arguments, **self.options)

    def compile(self) -> Any:
        """Compile what the launch would compile."""
        return self.function.warmup(*self.arguments, grid=self.grid, **self.options)


class Recorder:
    """Stands for a kernel in a package's launching module."""

    def __init__(self, function: Any, calls: list[Recorded]) -> None:
        self.function, self.calls = function, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.calls.append(Recorded(self.function, grid, arguments, options))


class Problem(NamedTuple):
    """q, k, v, dout [B, H, S, D] as views of [B, S, H, D], and the plan's special tokens u8 [B, S]."""

    q: Any
    k: Any
    v: Any
    dout: Any
    special: Any
    window: int


def make_problem(special: Any, heads: int, size: int, window: int, device: Any, dtype: Any, seed: int = 0) -> Problem:
    """Random tensors over some special tokens."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)

    def rows() -> Any:
        shape = (*special.shape, heads, size)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype).transpose(1, 2)

    return Problem(rows(), rows(), rows(), rows(), special.to(device), window)


def first_module(package: str, *names: str) -> Any:
    """The first of the modules that the package has: the base revision and the working tree differ in their layout."""
    for name in names:
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(package):
                raise
    raise ModuleNotFoundError(f"{package} has none of {', '.join(names)}")


class Variant:
    """A copy of the package."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.op = first_module(f"sep_{name}", "triton_op", "triton.op")
        self.tuning = first_module(f"sep_{name}", "tuning", "triton.tuning")
        self.package = importlib.import_module(f"sep_{name}")
        self.functions = {kernel: getattr(self.op, f"attention_{kernel}") for kernel in KERNELS}

    def plan(self, problem: Problem) -> Any:
        """The plan of a problem; that of one variant serves all."""
        return self.package.build_plan(problem.special)

    def record(
        self, problem: Problem, tiles: dict[str, tuple[Any, ...]], plan: Any
    ) -> tuple[dict[str, list[Recorded]], dict[str, Any]]:
        """Launches of the three kernels, not made yet, and their outputs, full of NaN. dQ comes before dK/dV."""
        import torch

        calls: dict[str, list[Recorded]] = {kernel: [] for kernel in KERNELS}
        forced = {kernel: self.tuning.Tile(*tile) for kernel, tile in tiles.items()}
        layer = (
            plan.tier, plan.prefix, plan.positions, None, None, None, problem.window,
            [self.package.FOREVER], problem.q.shape[-1] ** -0.5,
        )  # fmt: skip
        for kernel, function in self.functions.items():
            setattr(self.op, f"attention_{kernel}", Recorder(function, calls[kernel]))
        try:
            with self.tuning.forced_tiles(**forced):
                out, lse = self.op._launch_forward(problem.q, problem.k, problem.v, *layer)
                dq, dk, dv, _ = self.op._launch_backward(
                    problem.dout, problem.q, problem.k, problem.v, out, lse, *layer
                )
        finally:
            for kernel, function in self.functions.items():
                setattr(self.op, f"attention_{kernel}", function)
        outputs = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        for tensor in outputs.values():
            tensor.fill_(torch.nan)
        return calls, outputs


def shipped_tiles(size: int) -> dict[str, tuple[Any, ...]]:
    """The tiles of the table at b31b21f; small ones for the interpreter."""
    return {kernel: tiles_of(kernel, size)[0] for kernel in KERNELS}


def tiles_of(kernel: str, size: int) -> list[tuple[Any, ...]]:
    return TILES.get((kernel, size)) or [(32, 32, 4, 1), (32, 16, 4, 1)]


def configurations(size: int) -> list[tuple[str, str, tuple[Any, ...]]]:
    """(kernel, variant, tile) of a head size, the most telling first."""
    first = [(kernel, variant, tiles_of(kernel, size)[0]) for kernel in KERNELS for variant in ON_SHIPPED_TILE[kernel]]
    others = [
        (kernel, variant, tile)
        for kernel in KERNELS
        for variant in ON_OTHER_TILES[kernel]
        for tile in tiles_of(kernel, size)[1:]
    ]
    head = [(kernel, "head", tiles_of(kernel, size)[0]) for kernel in KERNELS]
    return first + head + others


# --- compile ahead: the same launches on CPU tensors, with a driver that only names the target


def compile_ahead(options: argparse.Namespace) -> int:
    """Compile every configuration into AB/cache with --jobs processes; --pack also writes AB/cache.tar.xz."""
    add_paths(options.input)
    cache = options.input.resolve() / "cache"
    if options.part is None:
        unpack_cache(options.input.resolve())
        command = [
            sys.executable,
            str(HERE / "kernels_ab.py"),
            "compile",
            "--input",
            str(options.input.resolve()),
            "--jobs",
            str(options.jobs),
        ]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        parts = [subprocess.Popen([*command, "--part", str(part)], env=environment) for part in range(options.jobs)]
        try:
            codes = [
                part.wait(max(1.0, options.deadline - time.monotonic()) if options.deadline else None) for part in parts
            ]
        except subprocess.TimeoutExpired:
            for part in parts:
                part.kill()
            print("compiling took all its time: what is missing is compiled when it is launched")
            return 1
        if options.pack and not any(codes):
            packed = options.input / "cache.tar.xz"
            aside = packed.with_suffix(".partial")
            with tarfile.open(aside, "w:xz", preset=2) as archive:
                archive.add(cache, "cache")
            aside.replace(packed)
            shutil.rmtree(cache)  # so that the folder can be carried as it is
            print(f"{packed}: {packed.stat().st_size / 2**20:.1f} MiB")
        return int(any(codes))
    import torch
    import triton

    triton.runtime.driver.set_active(NamedTarget())
    work: list[tuple[str, Any]] = []
    for size in REAL.head_sizes:
        # What is timed, and what a check or a chain launches beside it.
        every = [(kernel, variant, tiles_of(kernel, size)[0]) for variant in VARIANTS for kernel in KERNELS]
        for kernel, variant, tile in dict.fromkeys([*configurations(size), *every]):
            work.append(
                (f"{kernel} D={size} {variant} {tile}", lambda k=kernel, v=variant, t=tile, d=size: ahead(k, v, t, d))
            )
        for tile in (tile for tile in TILES["backward_kv", size] if len(tile) == 4):
            work.append((f"TMA D={size} {tile}", lambda t=tile, d=size: ahead("backward_kv", "tma", t, d)))
        work.append((f"Gluon D={size}", lambda d=size: ahead("forward", "gluon", (), d)))
    failed = 0
    for name, run in work[options.part :: options.jobs]:
        begin = time.monotonic()
        try:
            run()
        except Exception as error:
            failed += 1
            print(f"does not compile: {name}: {type(error).__name__} {' '.join(str(error).split())[:300]}", flush=True)
        else:
            if time.monotonic() - begin > 1:
                print(f"compiled {name} in {time.monotonic() - begin:.1f} s", flush=True)
    del torch
    return int(failed > 0)


def ahead(kernel: str, variant: str, tile: tuple[Any, ...], size: int) -> None:
    """Compile one configuration as its launch on a GPU would."""
    import torch

    # As divisible by 16 as the real lengths, numbers of blocks and heads: Triton compiles by that.
    special = torch.zeros(1, 2048 if variant == "gluon" else 256, dtype=torch.uint8)
    special[:, ::8] = 1
    problem = make_problem(special, REAL.hidden // size, size, REAL.window, torch.device("cpu"), torch.bfloat16)
    base = Variant("shipped")
    plan = base.plan(problem)
    if variant == "gluon":
        for launch in gluon_launches(problem, plan)[0]:
            launch.compile()
    elif variant == "tma":
        calls, outputs = base.record(problem, shipped_tiles(size), plan)
        tma_launch(problem, plan, calls, outputs, tile).compile()
    else:
        calls, _ = Variant(variant).record(problem, shipped_tiles(size) | {kernel: tile}, plan)
        for launch in calls[kernel]:
            launch.compile()


class NamedTarget:
    """A driver for compiling: it names an sm_90 GPU and has none."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def unpack_cache(folder: Path) -> None:
    """AB/cache from AB/cache.tar.xz; its group files name their members by absolute path, which differ by machine."""
    archive = folder / "cache.tar.xz"
    if not archive.is_file() or (folder / "cache").is_dir():
        return
    try:
        with tarfile.open(archive) as stream:
            stream.extractall(folder, filter="data")
    except (EOFError, OSError, tarfile.TarError) as error:
        print(f"{archive} cannot be unpacked ({error}): everything is compiled here")
        shutil.rmtree(folder / "cache", ignore_errors=True)
    for path in (folder / "cache").glob("*/__grp__*.json"):
        content = json.loads(path.read_text())
        content["child_paths"] = {
            name: str(path.parent / Path(child).name) for name, child in content["child_paths"].items()
        }
        path.write_text(json.dumps(content))


def tma_launch(
    problem: Problem, plan: Any, calls: dict[str, list[Recorded]], outputs: dict[str, Any], tile: tuple[Any, ...]
) -> Recorded:
    """dK/dV by TMA, into the outputs of a recording and from its statistics."""
    dkv_tma = importlib.import_module("dkv_tma")
    statistics_ = calls["backward_kv"][0].arguments[6]
    grid, arguments, options = dkv_tma.launch_arguments(
        problem.q,
        problem.k,
        problem.v,
        problem.dout,
        outputs["dk"],
        outputs["dv"],
        statistics_,
        plan,
        problem.window,
        tile,
    )
    return Recorded(dkv_tma.backward_kv_tma, grid, arguments, options)


def gluon_launches(problem: Problem, plan: Any) -> tuple[list[Recorded], dict[str, Any]]:
    """Gathering and forward in Gluon, and the outputs."""
    gluon_fwd = importlib.import_module("gluon_fwd")
    launches, out, lse = gluon_fwd.launches(problem.q, problem.k, problem.v, plan, problem.window, multiprocessors())
    return [Recorded(*launch) for launch in launches], {"out": out, "lse": lse}


def multiprocessors() -> int:
    import torch

    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132


# --- worker: one process that measures until the time is over


class Worker:
    """Runs the items that OUT/kernels_ab.jsonl does not hold yet."""

    def __init__(self, options: argparse.Namespace) -> None:
        import numpy as np
        import torch

        self.torch, self.np = torch, np
        self.options = options
        self.path = options.output / "kernels_ab.jsonl"
        self.scale = DRY if options.dry else REAL
        self.device = torch.device("cpu" if options.dry else "cuda")
        self.dtype = torch.float32 if options.dry else torch.bfloat16
        self.tolerance = TOLERANCE["fp32" if options.dry else "bf16"]
        self.variants: dict[str, Variant] = {}
        self.kept: dict[Any, Any] = {}
        self.results = read_results(self.path)
        content = np.load(options.input / "separators.npz")
        self.text = np.unpackbits(content["bits"], count=int(content["tokens"])).astype(bool)
        self.flush = torch.empty(FLUSH_BYTES if not options.dry else 1, dtype=torch.int8, device=self.device)

    def items(self) -> list[tuple[str, Any]]:
        """(key, function) in the order of their worth."""
        scale = self.scale
        lengths, sizes = scale.lengths, scale.head_sizes
        deciding, rest = lengths[:2], lengths[2:]
        items: list[tuple[str, Any]] = [("machine", self.machine)]
        for length, size in itertools.product(scale.checked, sizes):
            items.append((f"control D={size} S={length}", lambda s=length, d=size: self.control(s, d)))
            for variant in (
                "shipped",
                "p123",
                "p1234",
                "p1",
                "p2",
                "p3",
                "p23",
                "p4",
                "head",
            ):
                items.append(
                    (f"check D={size} S={length} {variant}", lambda s=length, d=size, v=variant: self.check(s, d, v))
                )
        for some in (deciding, rest):
            for source in ("text",):
                items += [self.baseline_item(s, d, source) for s in some for d in sizes]
                configs = {d: configurations(d) for d in sizes}
                # All lengths of a configuration before the next one: what is left out is then left out whole.
                longest = max(map(len, configs.values()))
                for number in range(longest):
                    items += [
                        self.time_item(*configs[d][number], d, s, source)
                        for d in sizes
                        if number < len(configs[d])
                        for s in some
                    ]
                items += [
                    self.time_item("backward_kv", "tma", tile, d, s, source)
                    for d in sizes
                    for tile in tiles_of("backward_kv", d)
                    if len(tile) == 4
                    for s in some
                ]
                items += [
                    self.chain_item(name, s, d, source)
                    for s in some
                    for d in sizes
                    for name in ("shipped", "bound", "best")
                ]
                items += [self.gluon_item(s, d, source) for s in some for d in sizes]
        for s, d in itertools.product(lengths, sizes):
            items.append(self.baseline_item(s, d, "12%"))
            items += [self.chain_item(name, s, d, "12%") for name in ("shipped", "bound", "best")]
        for s, d in itertools.product(deciding, sizes):  # the same once more: what differs by less than this is noise
            items += [
                (f"again {key}", run)
                for key, run in (self.chain_item(name, s, d, "text") for name in ("shipped", "best"))
            ]
        return items

    def run(self) -> int:
        marker = self.options.output / "now.json"
        for key, function in self.items():
            if key in self.results:
                continue
            if time.time() > self.options.until:
                print("the time is over", flush=True)
                break
            marker.write_text(json.dumps({"key": key, "time": time.time()}))
            begin = time.perf_counter()
            try:
                result = function()
                self.synchronize()
            except Exception as error:
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                fatal = "CUDA error" in text or "illegal memory" in text or "launch failure" in text
                self.append({"key": key, "failure": text})
                if fatal:  # the context is lost: another process goes on
                    return 3
                self.kept.clear()
                continue
            self.append({"key": key, **result, "took": round(time.perf_counter() - begin, 3)})
        marker.unlink(missing_ok=True)
        return 0

    def append(self, record: dict[str, Any]) -> None:
        self.results[record["key"]] = record
        append(self.path, record)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    # What is measured.

    def machine(self) -> dict[str, Any]:
        torch = self.torch
        import triton

        facts: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
        if self.device.type == "cuda":
            facts |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
            a, b = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
            facts["matmul_tflops"] = 2 * 8192**3 / self.time(lambda: a @ b)["median"] / 1e9
            source = torch.empty(2**30, dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            facts["copy_gbytes"] = 2 * 2**30 / self.time(lambda: target.copy_(source))["median"] / 1e6
        return facts

    def variant(self, name: str) -> Variant:
        if name not in self.variants:
            self.variants[name] = Variant(name)
        return self.variants[name]

    def special(self, length: int, batch: int, source: str) -> Any:
        np = self.np
        if source == "text":
            starts = np.linspace(0, len(self.text) - length, batch).astype(int)
            rows = np.stack([self.text[start : start + length] for start in starts])
        else:
            rows = np.random.default_rng(0).random((batch, length)) < float(source.rstrip("%")) / 100
        rows[:, :3] = True
        return self.torch.from_numpy(rows.astype(np.uint8))

    def problem(self, length: int, size: int, source: str) -> tuple[Problem, Any, Any]:
        """A problem of the usual number of tokens, the shipped recording that ran on it, and its outputs."""
        key = ("problem", length, size, source)
        if key not in self.kept:
            if len(self.kept) > 4:
                self.kept.clear()
                if self.device.type == "cuda":
                    self.torch.cuda.empty_cache()
            special = self.special(length, max(1, self.scale.tokens // length), source)
            problem = make_problem(special, self.scale.hidden // size, size, self.scale.window, self.device, self.dtype)
            shipped = self.variant("shipped")
            calls, outputs = shipped.record(problem, shipped_tiles(size), shipped.plan(problem))
            for kernel in KERNELS:
                for call in calls[kernel]:
                    call()
            self.kept[key] = problem, calls, outputs
        return self.kept[key]

    def errors(self, outputs: dict[str, Any], truth: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
        """Relative errors; raises for one beyond the tolerance (NaN included)."""
        found = {}
        for name in names:
            wanted = truth[name].float()
            found[name] = float((outputs[name].detach().float() - wanted).norm() / wanted.norm())
        if not all(error <= self.tolerance for error in found.values()):
            raise ValueError(f"wrong result: {found}")
        return found

    def oracle(self, problem: Problem, window: int) -> dict[str, Any]:
        """Output and gradients of dense masked attention in fp32 (fp64 where it is dry), a head at a time."""
        torch = self.torch
        length = problem.q.shape[2]
        exact = torch.float64 if self.options.dry else torch.float32
        i = torch.arange(length, device=self.device)
        distance = i[:, None] - i
        parts: dict[str, list[Any]] = {name: [] for name in ("out", "dq", "dk", "dv")}
        for b in range(problem.q.shape[0]):
            hidden = (distance < 0) | ((distance >= window) & (problem.special[b] == 0)[None, :])
            for h in range(problem.q.shape[1]):
                q, k, v = (x[b, h].to(exact).requires_grad_() for x in problem[:3])
                scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
                out = scores.softmax(-1) @ v
                gradients = torch.autograd.grad(out, (q, k, v), problem.dout[b, h].to(exact))
                for name, tensor in zip(parts, (out.detach(), *gradients), strict=True):
                    parts[name].append(tensor)
        shape = problem.q.shape
        return {name: torch.stack(tensors).view(shape[0], shape[1], *shape[2:]) for name, tensors in parts.items()}

    def checked(self, length: int, size: int, window: int) -> tuple[Problem, dict[str, Any]]:
        key = ("oracle", length, size, window)
        if key not in self.kept:
            special = self.special(length, 2, "text")
            problem = make_problem(special, 2, size, window, self.device, self.dtype, seed=length + size)
            self.kept[key] = problem, self.oracle(problem, window)
        return self.kept[key]

    def check(self, length: int, size: int, name: str, window: int | None = None) -> dict[str, Any]:
        """Forward, dQ and dK/dV of a variant on the shipped tiles against the oracle, twice, bit for bit."""
        problem, truth = self.checked(length, size, window or self.scale.window)
        variant = self.variant(name)
        seen = []
        for _ in range(2):
            calls, outputs = variant.record(problem, shipped_tiles(size), self.variant("shipped").plan(problem))
            for kernel in KERNELS:
                for call in calls[kernel]:
                    call()
            seen.append(outputs)
        errors = self.errors(seen[0], truth, ("out", "dq", "dk", "dv"))
        same = all(self.torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
        if not same:
            raise ValueError("two runs differ")
        return {"errors": errors, "bitwise": same}

    def control(self, length: int, size: int) -> dict[str, Any]:
        """Dense causal attention: cuDNN and ours with a window of the whole length, against the dense oracle."""
        problem, truth = self.checked(length, size, length)
        out, gradients = self.dense(problem)
        dense = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
        found = {"cudnn": self.errors(dense, truth, tuple(dense))}
        for name in ("shipped", "p1234"):
            found[name] = self.check(length, size, name, window=length)["errors"]
        del self.kept["oracle", length, size, length]
        return {"errors": found}

    def dense(self, problem: Problem, leaves: Any = None) -> tuple[Any, Any]:
        """Dense attention of the library, and gradients."""
        torch = self.torch
        leaves = leaves or [x.detach().requires_grad_() for x in problem[:3]]
        out = self.dense_forward(leaves)
        return out, torch.autograd.grad(out, leaves, problem.dout)

    def dense_forward(self, leaves: Any) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = SDPBackend.MATH if self.options.dry else SDPBackend.CUDNN_ATTENTION
        with sdpa_kernel(backend):
            q, k, v = leaves
            return self.torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def time(self, run: Any, prepare: Any = None, wait: int = 800_000) -> dict[str, float]:
        """Milliseconds of a call on a flushed cache, the host being ahead of the device; median and quartiles."""
        torch = self.torch
        calls = self.scale.calls
        arguments = [() if prepare is None else (prepare(),) for _ in range(1)]
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run(*arguments[0])
            elapsed = 1e3 * (time.perf_counter() - begin)
            return {"median": elapsed, "low": elapsed, "high": elapsed}
        for _ in range(3):
            run(*(() if prepare is None else (prepare(),)))
        events = []
        for _ in range(calls):
            argument = () if prepare is None else (prepare(),)
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.flush.zero_()
            torch.cuda._sleep(wait)
            pair[0].record()
            run(*argument)
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        low, median, high = statistics.quantiles([a.elapsed_time(b) for a, b in events], n=4)
        return {"median": median, "low": low, "high": high}

    def baseline_item(self, length: int, size: int, source: str) -> tuple[str, Any]:
        return f"cudnn D={size} S={length} {source}", lambda: self.baseline(length, size, source)

    def baseline(self, length: int, size: int, source: str) -> dict[str, Any]:
        problem = self.problem(length, size, source)[0]
        leaves = [x.detach().requires_grad_() for x in problem[:3]]

        def backward(out: Any) -> None:
            self.torch.autograd.grad(out, leaves, problem.dout)

        times = {
            "forward": self.time(lambda: self.dense_forward(leaves)),
            "backward": self.time(backward, lambda: self.dense_forward(leaves), wait=1_500_000),
            "both": self.time(lambda: self.dense(problem, leaves), wait=2_000_000),
        }
        return {"S": length, "D": size, "source": source, "times": times}

    def time_item(
        self, kernel: str, variant: str, tile: tuple[Any, ...], size: int, length: int, source: str
    ) -> tuple[str, Any]:
        name = "x".join(map(str, tile[:2])) + f"w{tile[2]}s{tile[3]}" + (f"r{tile[4]}" if len(tile) > 4 else "")
        key = f"{kernel} D={size} S={length} {source} {variant} {name}"
        return key, lambda: self.time_kernel(kernel, variant, tile, name, size, length, source)

    def time_kernel(
        self, kernel: str, variant: str, tile: tuple[Any, ...], name: str, size: int, length: int, source: str
    ) -> dict[str, Any]:
        """Time of one kernel once its outputs are those of the shipped one, which the oracle has been asked about."""
        problem, calls, truth = self.problem(length, size, source)
        shipped = self.variant("shipped")
        if variant == "tma":
            plan = shipped.plan(problem)
            outputs = {key: self.torch.full_like(truth[key], self.torch.nan) for key in ("dk", "dv")}
            mine = [tma_launch(problem, plan, calls, outputs, tile)]
        else:
            chosen = self.variant(variant)
            recorded, outputs = chosen.record(problem, shipped_tiles(size) | {kernel: tile}, shipped.plan(problem))
            for before in KERNELS[: KERNELS.index(kernel)]:
                for call in recorded[before]:
                    call()
            mine = recorded[kernel]
        compiled = mine[-1]()
        resources = {name: getattr(compiled, name, None) for name in ("n_regs", "n_spills")}
        names = {"forward": ("out", "lse"), "backward_q": ("dq",), "backward_kv": ("dk", "dv")}[kernel]
        errors = self.errors(outputs, truth, names)
        timing = self.time(lambda: [call() for call in mine])
        return {
            "kernel": kernel, "variant": variant, "tile": list(tile), "name": f"{variant} {name}", "D": size,
            "S": length, "source": source, "errors": errors, "time": timing, **resources,
        }  # fmt: skip

    def gluon_item(self, length: int, size: int, source: str) -> tuple[str, Any]:
        return f"gluon D={size} S={length} {source}", lambda: self.gluon(length, size, source)

    def gluon(self, length: int, size: int, source: str) -> dict[str, Any]:
        if self.options.dry:
            return {"skipped": "Gluon has no interpreter; `compile` compiles it"}
        problem, _, truth = self.problem(length, size, source)
        seen = []
        for _ in range(2):
            launches, outputs = gluon_launches(problem, self.variant("shipped").plan(problem))
            outputs["out"].fill_(self.torch.nan)
            for launch in launches:
                launch()
            seen.append(outputs)
        errors = self.errors(seen[0], truth, ("out", "lse"))
        return {
            "kernel": "forward", "variant": "gluon", "name": "gluon", "D": size, "S": length, "source": source,
            "errors": errors, "bitwise": bool(self.torch.equal(seen[0]["out"], seen[1]["out"])),
            "without_gather": self.time(launches[1]), "time": self.time(lambda: [launch() for launch in launches]),
        }  # fmt: skip

    def chain_item(self, which: str, length: int, size: int, source: str) -> tuple[str, Any]:
        return f"chain D={size} S={length} {source} {which}", lambda: self.chain(which, length, size, source)

    def chain(self, which: str, length: int, size: int, source: str) -> dict[str, Any]:
        """Forward, dQ and dK/dV one after the other: shipped, all switches on the shipped tiles, or what is kept."""
        chosen = {kernel: ("shipped", tiles_of(kernel, size)[0]) for kernel in KERNELS}
        if which == "bound":
            chosen = {kernel: (BOUND[kernel], tiles_of(kernel, size)[0]) for kernel in KERNELS}
        elif which == "best":
            for kernel in KERNELS:
                best = decide(self.results, kernel, size, self.scale.lengths[:2], without=("gluon", "tma"))["kept"]
                if best is not None:
                    chosen[kernel] = (best["variant"], tuple(best["tile"]))
        problem, _, truth = self.problem(length, size, source)
        plan = self.variant("shipped").plan(problem)
        launches: list[Recorded] = []
        outputs = {"out": truth["out"], "lse": truth["lse"]}
        for kernel in KERNELS:
            variant, tile = chosen[kernel]
            recorded, made = self.variant(variant).record(problem, shipped_tiles(size) | {kernel: tile}, plan)
            launches += rewired(kernel, recorded, made, launches, outputs)
        for call in launches:
            call()
        errors = self.errors(outputs, truth, ("out", "dq", "dk", "dv"))
        return {
            "chain": which, "chosen": {kernel: [v, list(t)] for kernel, (v, t) in chosen.items()}, "D": size,
            "S": length, "source": source, "errors": errors,
            "time": self.time(lambda: [call() for call in launches], wait=1_500_000),
        }  # fmt: skip


def rewired(
    kernel: str,
    recorded: dict[str, list[Recorded]],
    made: dict[str, Any],
    before: list[Recorded],
    outputs: dict[str, Any],
) -> list[Recorded]:
    """Launches of a kernel that read what the kernels before it in the chain wrote: out, lse and the statistics."""
    if kernel == "forward":
        outputs |= {"out": made["out"], "lse": made["lse"]}
        return recorded[kernel]
    exchanged = {id(made["out"]): outputs["out"], id(made["lse"]): outputs["lse"]}
    if kernel == "backward_q":
        outputs["dq"] = made["dq"]
    else:
        outputs |= {"dk": made["dk"], "dv": made["dv"]}
        # STATISTICS is argument 6 of dK/dV and 7 of dQ, the launch before.
        exchanged[id(recorded[kernel][0].arguments[6])] = before[-1].arguments[7]
    return [
        call._replace(arguments=tuple(exchanged.get(id(argument), argument) for argument in call.arguments))
        for call in recorded[kernel]
    ]


# --- results


def append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf8") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    results = {}
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a worker that was ended
            continue
        results[record["key"]] = record
    return results


def medians(
    results: dict[str, Any], kernel: str, size: int, source: str = "text"
) -> dict[str, dict[int, dict[str, Any]]]:
    """Configuration -> length -> result of a kernel."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in results.values():
        if record.get("kernel") == kernel and record["D"] == size and record["source"] == source:
            found.setdefault(record["name"], {})[record["S"]] = record
    return found


def decide(
    results: dict[str, Any], kernel: str, size: int, deciding: tuple[int, ...], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The configuration with the best mean ratio to the shipped one.

    `kept` is the best of those that gain more than MARGIN at a measured length and lose more than LOSS at none.
    """
    table = medians(results, kernel, size)
    shipped = next(
        (rows for name, rows in table.items() if name.startswith("shipped ") and _is_first(rows, kernel, size)), {}
    )
    best, kept = None, None
    for rows in table.values():
        if (
            rows is shipped
            or next(iter(rows.values()))["variant"] in without
            or any(length not in rows or length not in shipped for length in deciding)
        ):
            continue
        ratios = [rows[length]["time"]["median"] / shipped[length]["time"]["median"] for length in deciding]
        entry = {
            **rows[deciding[0]],
            "score": statistics.geometric_mean(ratios),
            "ratios": dict(zip(deciding, ratios, strict=True)),
        }
        if best is None or entry["score"] < best["score"]:
            best = entry
        measured = [
            rows[length]["time"]["median"] / shipped[length]["time"]["median"] for length in rows if length in shipped
        ]
        if (
            min(measured) < 1 - MARGIN
            and max(measured) <= 1 + LOSS
            and (kept is None or entry["score"] < kept["score"])
        ):
            kept = entry
    return {"shipped": shipped, "best": best, "kept": kept, "table": table}


def _is_first(rows: dict[int, dict[str, Any]], kernel: str, size: int) -> bool:
    return tuple(next(iter(rows.values()))["tile"]) == tuple(tiles_of(kernel, size)[0])


def summary(path: Path, dry: bool) -> str:
    """The tables and what the rule says."""
    results = read_results(path)
    scale = DRY if dry else REAL
    deciding = scale.lengths[:2]
    order = sorted(scale.lengths)
    lines = [
        f"machine: {json.dumps({k: v for k, v in results.get('machine', {}).items() if k not in ('key', 'took')})}"
    ]
    failures = [record for record in results.values() if "failure" in record]
    checks = [record for key, record in results.items() if key.startswith(("check", "control"))]
    lines.append(
        f"correctness: {sum('failure' not in record for record in checks)} of {len(checks)} cases right and bitwise"
    )
    lines += [f"FAILED {record['key']}: {record['failure'][:160]}" for record in failures[:12]]
    for size in scale.head_sizes:
        for kernel in KERNELS:
            found = decide(results, kernel, size, deciding)
            if not found["shipped"]:
                continue
            lines.append(f"\n{kernel} D={size}, ms (ratio to shipped), S = {', '.join(map(str, order))}")
            ranked = sorted(found["table"].items(), key=lambda item: _rank(item[1], found["shipped"]))
            for name, rows in [(n, r) for n, r in ranked if r is found["shipped"]] + [
                (n, r) for n, r in ranked if r is not found["shipped"]
            ][:8]:
                cells = []
                for length in order:
                    if length not in rows:
                        cells.append("-")
                        continue
                    value = rows[length]["time"]["median"]
                    base = found["shipped"].get(length)
                    cells.append(f"{value:.3f}" + (f" ({value / base['time']['median']:.2f})" if base else ""))
                lines.append(f"  {name:28} " + "  ".join(f"{cell:>14}" for cell in cells))
            kept = found["kept"]
            lines.append(
                f"  keep: {kept['name']} {_ratios(kept)}"
                if kept
                else f"  keep: shipped (nothing gains {MARGIN:.0%} at a length and loses {LOSS:.0%} at none)"
            )
            if kept and kept["variant"] in ("gluon", "tma"):
                kept = decide(results, kernel, size, deciding, without=("gluon", "tma"))["kept"]
                lines.append(f"  without Gluon and TMA: {kept['name'] + ' ' + _ratios(kept) if kept else 'shipped'}")
    lines.append("\nforward and backward, times cuDNN (bar)")
    for source, size in itertools.product(("text", "12%"), scale.head_sizes):
        for which in ("shipped", "bound", "best"):
            cells = []
            for length in order:
                mine, dense = (
                    results.get(f"chain D={size} S={length} {source} {which}"),
                    results.get(f"cudnn D={size} S={length} {source}"),
                )
                if not mine or not dense or "time" not in mine or "times" not in dense:
                    continue
                ratio = dense["times"]["both"]["median"] / mine["time"]["median"]
                cells.append(
                    f"{length}: {ratio:.2f}" + (f" ({BARS[size][length]})" if length in BARS.get(size, {}) else "")
                )
            if cells:
                lines.append(f"  D={size} {source} {which:8} " + "  ".join(cells))
    for size in scale.head_sizes:
        spread = [
            abs(results[f"again {key}"]["time"]["median"] / results[key]["time"]["median"] - 1)
            for key in results
            if f"D={size} " in key and all("time" in results.get(name, {}) for name in (key, f"again {key}"))
        ]
        if spread:
            lines.append(f"the same twice, D={size}: differs by at most {max(spread):.1%}")
    return "\n".join(lines)


def _rank(rows: dict[int, dict[str, Any]], shipped: dict[int, dict[str, Any]]) -> float:
    ratios = [rows[s]["time"]["median"] / shipped[s]["time"]["median"] for s in rows if s in shipped]
    return statistics.geometric_mean(ratios) if ratios else 9.0


def _ratios(entry: dict[str, Any]) -> str:
    return ", ".join(f"{length}: {ratio:.2f}" for length, ratio in entry["ratios"].items())


# --- the run: a parent without a GPU that watches the worker


def add_paths(folder: Path) -> None:
    sys.path[:0] = [str(folder.resolve()), str(folder.resolve() / "variants")]


def run(options: argparse.Namespace) -> int:
    """Compile what is missing, start workers until the time is over, print the summary."""
    begin = time.time()
    options.output.mkdir(parents=True, exist_ok=True)
    until = begin + options.seconds
    folder = options.input.resolve()
    if not options.dry:
        argument = argparse.Namespace(
            input=folder, jobs=options.jobs, part=None, pack=False, deadline=time.monotonic() + options.seconds / 3
        )
        compile_ahead(argument)
        print(f"compiled after {time.time() - begin:.0f} s", flush=True)
    path = options.output.resolve() / "kernels_ab.jsonl"
    marker = path.with_name("now.json")
    command = [
        sys.executable,
        str(HERE / "kernels_ab.py"),
        "work",
        "--input",
        str(folder),
        "--output",
        str(options.output.resolve()),
        "--until",
        str(until - 3),
    ]
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    for _ in range(8):
        if time.time() > until - 15:
            break
        marker.unlink(missing_ok=True)
        worker = subprocess.Popen(command + ["--dry"] * options.dry, env=environment, start_new_session=True)
        verdict = watch(worker, marker, until + 5, 3600 if options.dry else HANG_SECONDS)
        if verdict == 0:
            break
        now = json.loads(marker.read_text()) if marker.is_file() else {"key": "start"}
        if now["key"] not in read_results(path) and time.time() < until:
            append(path, {"key": now["key"], "failure": f"the worker ended: {verdict}"})
        print(f"worker ended ({verdict}) at {now['key']}: another one takes over", flush=True)
    text = summary(path, options.dry)
    (options.output / "summary.txt").write_text(text + "\n", encoding="utf8")
    print(f"{text}\n{time.time() - begin:.0f} s, {len(read_results(path))} results in {path.name}", flush=True)
    return 0


def watch(worker: subprocess.Popen[bytes], marker: Path, until: float, patience: float) -> int | str:
    """Exit code of the worker, or why it was ended."""
    try:
        while worker.poll() is None:
            time.sleep(0.25)
            try:
                since = json.loads(marker.read_text())["time"]
            except (OSError, ValueError, KeyError):
                since = None
            if since is not None and time.time() - since > patience:
                return "hung"
            if time.time() > until:
                return 0
        return worker.returncode
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare")
    command.add_argument("--repository", type=Path, default=Path("."), help="checkout (%(default)s)")
    command.add_argument("--base", default="b31b21f", help="commit that switches.patch is of (%(default)s)")
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(call=prepare)
    command = commands.add_parser("compile")
    command.add_argument("--input", type=Path, default=HERE)
    command.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    command.add_argument("--part", type=int)
    command.add_argument("--pack", action="store_true", help="write AB/cache.tar.xz")
    command.set_defaults(call=compile_ahead, deadline=None)
    command = commands.add_parser("run")
    command.add_argument("--input", type=Path, default=HERE)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--seconds", type=float, default=400, help="of everything (%(default)s)")
    command.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2))
    command.add_argument("--dry", action="store_true")
    command.set_defaults(call=run)
    command = commands.add_parser("work")
    command.add_argument("--input", type=Path, required=True)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--until", type=float, required=True)
    command.add_argument("--dry", action="store_true")
    command.set_defaults(call=work)
    options = parser.parse_args()
    return options.call(options)


def work(options: argparse.Namespace) -> int:
    add_paths(options.input)
    return Worker(options).run()


if __name__ == "__main__":
    raise SystemExit(main())
