"""Facts about a machine for the report of a fault, and what on it will not work, with what to do about it.

Nothing here needs torch or any other package to be sound: it is for environments that are not.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from sepllm_train import requirements
from sepllm_train.base.secrets import masked, names_a_secret
from sepllm_train.distributed.all_reduce import measure, measure_here

PROJECT = requirements.PROJECT
OPTIONAL = ("triton", "flash-attn", "transformer-engine", "apex", "wandb")
# Variables that change what a run does.
VARIABLES = ("CUDA_", "GLOO_", "HYDRA_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "PYTORCH_", "SEPLLM_", "TORCH", "TRITON_")
EXACT_VARIABLES = (
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTHONPATH",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_NODELIST",
    "SLURM_CPUS_ON_NODE",
    "SLURM_GPUS_ON_NODE",
    "SLURM_RESTART_COUNT",
)
SIZES = ("memory", "memory_available", "container_memory", "shared_memory", "free", "total")
IN_MEMORY = ("tmpfs", "ramfs")
GIB = 1 << 30
# 14 bytes a parameter (bf16 weights, fp32 weights, Adam's two moments) are 18 GiB for 1.4B; two are kept.
LEAST_FREE_BYTES = 37 * GIB
LEAST_SHARED_MEMORY_BYTES = 256 << 20


def facts(run_root: Path, cache: Path) -> dict[str, dict[str, Any]]:
    """Sections of the report: name -> value, with None for what cannot be found out. Sizes are bytes."""
    return {
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "libc": " ".join(platform.libc_ver()),
            "c_compiler": next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None),
            "slurm": _first_line("sbatch", "--version"),
        },
        "packages": _packages(),
        "torch": _torch(),
        "gpu": _gpu(),
        "machine": _machine(),
        "run_root": _disk(run_root),
        "cache": _disk(cache),
        "variables": {
            name: masked(value)
            for name, value in sorted(os.environ.items())
            if (name.startswith(VARIABLES) or name in EXACT_VARIABLES) and not names_a_secret(name)
        },
    }


def advice(found: dict[str, dict[str, Any]]) -> list[str]:
    """One sentence for everything in `found` (of `facts`) that will go wrong, with what to do."""
    told = [*found["packages"]["unmet"]]
    torch, gpu, machine = found["torch"], found["gpu"], found["machine"]
    ranges = requirements.declared()
    version = tuple(map(int, re.findall(r"\d+", found["python"]["version"])[:3]))
    if ranges and (wrong := requirements.python_problem(version, ranges.python)):
        told.append(wrong)
    if torch.get("error"):
        told.append(f"torch cannot be imported ({torch['error']}): install the build for this machine again.")
    elif gpu["devices"] and not torch["cuda"]:
        told.append("the machine has GPUs, but torch is a build without CUDA: install the one for your driver.")
    elif gpu["devices"] and not torch["gpus"]:
        told.append(
            f"torch for CUDA {torch['cuda']} finds none of the GPUs that nvidia-smi lists (driver {gpu['driver']}): "
            "see CUDA_VISIBLE_DEVICES, then take a newer driver or a build for an older CUDA."
        )
    elif gpu["devices"] and not torch["nccl"]:
        told.append("torch has no NCCL: several GPUs need a build that has it.")
    if found["packages"]["apex"] == "not NVIDIA's":
        told.append(
            "the package apex has no amp_C: it is the unrelated one of the package index, or NVIDIA's without its "
            "extensions; pip uninstall apex, and build NVIDIA's from its source for fused Adam."
        )
    if gpu["devices"] and found["packages"]["triton"] and not found["python"]["c_compiler"]:
        told.append("Triton needs a C compiler to build its launchers: install gcc or clang.")
    for key in ("run_root", "cache"):
        told += _disk_advice(key, found[key])
    shared = machine["shared_memory"]
    if shared is not None and shared < LEAST_SHARED_MEMORY_BYTES:
        told.append(
            f"/dev/shm holds {_size(shared)}, too little for data workers and NCCL: start the container with a larger "
            "one (docker run --shm-size=16g), or set data.workers=0."
        )
    if machine["infiniband"] and machine["locked_memory"] != "unlimited":
        told.append(
            f"InfiniBand ({', '.join(machine['infiniband'])}) needs locked memory, limited to "
            f"{machine['locked_memory']}: set `ulimit -l unlimited` (in Slurm: PropagateResourceLimitsExcept=MEMLOCK)."
        )
    for test in found.get("self_test", {}).values():
        if "error" in test:
            interface = "NCCL_SOCKET_IFNAME" if test["backend"] == "nccl" else "GLOO_SOCKET_IFNAME"
            told.append(
                f"the {test['backend']} all-reduce of {test['processes']} processes fails ({test['error']}): see the "
                f"firewall, and set {interface} to the interface that joins the nodes."
            )
    return told


def self_test(mebibytes: int, gpus: int) -> dict[str, dict[str, Any]]:
    """All-reduce over this launch (torchrun, srun), or over two CPU processes and all `gpus` of this machine."""
    if "RANK" in os.environ:
        backend = "nccl" if gpus else "gloo"
        return {backend: measure(backend, mebibytes)}
    tests = {"gloo": measure_here("gloo", 2, mebibytes)}
    return {**tests, "nccl": measure_here("nccl", gpus, mebibytes)} if gpus else tests


def print_report(found: dict[str, dict[str, Any]]) -> None:
    """Print `found` (of `facts`) and the advice on it."""
    told = advice(found)
    for section, values in found.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:<24} {_shown(name, value)}")
    print(f"advice: {'none' if not told else ''}")
    for number, sentence in enumerate(told, start=1):
        print(f"  {number}. {sentence}")


def _packages() -> dict[str, Any]:
    """Versions of what the project requires and can use, and `unmet`: a sentence for each requirement that is not."""
    ranges = requirements.declared()
    wanted = ranges.packages if ranges else []
    names = [re.split(r"[^\w-]", line)[0] for line in wanted]
    versions: dict[str, Any] = {name: _version(name) for name in (PROJECT, *names)}
    unmet = [one.sentence() for one in requirements.unmet(wanted)]
    versions |= {name: _version(name) for name in OPTIONAL}
    # NVIDIA's apex is known by its compiled extension.
    if importlib.util.find_spec("apex") is not None:
        versions["apex"] = "NVIDIA's" if importlib.util.find_spec("amp_C") is not None else "not NVIDIA's"
    return {**versions, "unmet": unmet}


def _version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """Build of torch and the devices that it finds."""
    try:
        torch: Any = importlib.import_module("torch")
        nccl = torch.distributed.is_nccl_available()
        return {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
            "gloo": torch.distributed.is_gloo_available(),
            "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
            "threads": torch.get_num_threads(),
        }
    except Exception as error:
        # A broken installation fails in many ways; the report is about them.
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0], "gpus": 0}


def _gpu() -> dict[str, Any]:
    """GPUs as the NVIDIA driver lists them."""
    fields = "name,memory.total,driver_version,mig.mode.current,compute_mode"
    lines = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    devices = [[cell.strip() for cell in line.split(",")] for line in lines if line.count(",") == fields.count(",")]
    return {
        "devices": [f"{name}, {memory}, MIG {mig}, compute mode {mode}" for name, memory, _, mig, mode in devices],
        "driver": devices[0][2] if devices else None,
        "topology": _output("nvidia-smi", "topo", "-m") if len(devices) > 1 else None,
    }


def _machine() -> dict[str, Any]:
    """Processor, memory and limits; a container's own limits where it has them."""
    memory = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in _read("/proc/meminfo").splitlines()
        if line.endswith("kB")
    }
    models = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    adapters = Path("/sys/class/infiniband")
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "container_cores": int(quota[0]) / int(quota[1]) if quota and quota[0] != "max" else None,
        "memory": memory.get("MemTotal"),
        "memory_available": memory.get("MemAvailable"),
        "container_memory": int(limit) if limit.isdigit() else None,
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": "unlimited" if locked == resource.RLIM_INFINITY else _size(locked),
        "infiniband": sorted(entry.name for entry in adapters.iterdir()) if adapters.is_dir() else [],
    }


def _disk(folder: Path) -> dict[str, Any]:
    """The filesystem that holds `folder`, or will: that of its nearest parent which exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return {
        "path": str(folder.absolute()),
        "filesystem": _filesystem(place.resolve()),
        "free": usage.free,
        "total": usage.total,
        "error": _why_unwritable(place),
    }


def _filesystem(place: Path) -> str | None:
    """Type of the filesystem that `place` is on: the mount with the longest path above it."""
    found, length = None, -1
    for line in _read("/proc/mounts").splitlines():
        _, mount, kind = line.split()[:3]
        point = Path(mount.encode().decode("unicode_escape"))
        # Of mounts over one another the last one counts.
        if place.is_relative_to(point) and len(point.parts) >= length:
            found, length = kind, len(point.parts)
    return found


def _why_unwritable(place: Path) -> str | None:
    """Reason why no file can be made there; None when one can."""
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror


def _disk_advice(key: str, disk: dict[str, Any]) -> list[str]:
    """Sentences about one filesystem."""
    where = f"{key}={disk['path']}"
    remedy = "choose another run_root=" if key == "run_root" else "set SEPLLM_CACHE"
    if disk["error"] is not None:
        return [f"{where} cannot be written ({disk['error']}): {remedy}."]
    told = []
    if disk["filesystem"] in IN_MEMORY:
        told.append(f"{where} is on a {disk['filesystem']}: it takes memory and is gone after a restart; {remedy}.")
    if key == "run_root" and disk["free"] < LEAST_FREE_BYTES:
        told.append(
            f"{where} has {_size(disk['free'])} left: two checkpoints of a 1.4B model take {_size(LEAST_FREE_BYTES)}; "
            f"free some, or {remedy}."
        )
    return told


def _first_line(*command: str) -> str | None:
    return next(iter(_output(*command).splitlines()), None)


def _output(*command: str) -> str:
    """Output of a program; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: str) -> str:
    """A file of the kernel's; nothing where it is not there."""
    try:
        return Path(path).read_text(encoding="utf8", errors="replace")
    except OSError:
        return ""


def _size(count: int) -> str:
    """Bytes as GiB, or MiB below one."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


def _shown(name: str, value: Any) -> str:
    """A value on the terminal."""
    if name in SIZES and value is not None:
        return _size(value)
    if isinstance(value, dict):
        rate = value.get("gigabytes_per_second")
        told = value.get("error") or f"{value['seconds'] * 1e3:.1f} ms for {value['mebibytes']} MiB"
        return f"{value['processes']} processes, {told}" + (f", {rate:.2f} GB/s on the wire" if rate else "")
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    if isinstance(value, str) and "\n" in value:
        return "\n    " + value.replace("\n", "\n    ")
    return "-" if value is None else str(value)
