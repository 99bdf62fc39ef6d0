"""Run the fast half of the tests in the oldest, the shipped and the newest versions of what the project stands on.

python scripts/matrix.py --record
python scripts/matrix.py --only newest --smoke
python scripts/matrix.py --render

Each combination gets an environment of its own in .cache/matrix, made from an interpreter that scripts/find_python.sh
finds, and removed after its tests. One whose interpreter, packages or disk are not there is skipped with the reason.
Finished combinations are not run again for the same commit. `--record` writes results/versions.json and the table
of docs/versions.md. Exit code 1 where a combination fails; skipping is no failure.
"""

from __future__ import annotations

import check_environment  # noqa: F401

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from install import CUDA_BUILD, GB, ROOT

from sepllm_train.base.console import duration


class Combination(NamedTuple):
    """An environment: the minor version of Python 3 and pip's constraints, None for constraints.txt."""

    name: str
    minor: int
    pins: tuple[str, ...] | None


COMBINATIONS = (
    Combination(
        "oldest",
        11,
        (
            *("torch==2.11.0", "megatron-core==0.16.1", "numpy==1.26.*", "transformers==5.5.*"),
            *("hydra-core==1.3.2", "omegaconf==2.3.*", "pyarrow<26"),
        ),
    ),
    Combination("shipped", 11, None),
    Combination("shipped on 3.12", 12, None),
    # Without pins pip takes the newest of each that the ranges of setup.py and this machine's settings allow.
    Combination("newest", 13, ()),
)
# What `make test` gives pytest.
FAST = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow")
PACKAGES = ("torch", "megatron-core", "triton", "numpy", "transformers", "hydra-core", "omegaconf")
RESULTS = ROOT / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
REGION = re.compile(r"(<!-- matrix: written by scripts/matrix.py -->\n).*?(<!-- end of matrix -->)", re.DOTALL)

_VERSIONS = """
import json, platform
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in %r}}))
"""


class Skipped(Exception):
    """The reason why a combination cannot be run on this machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the combinations; gives the exit code."""
    options = _parser().parse_args(arguments)
    if options.render:
        PAGE.write_text(render(PAGE.read_text(encoding="utf8"), _read(RESULTS)), encoding="utf8")
        return 0
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    mode = "smoke" if options.smoke else "tests"
    finished = _read(folder / "results.json")
    failed = False
    for combination in COMBINATIONS:
        if options.only and combination.name not in options.only:
            continue
        before = finished.get(f"{combination.name}: {mode}", {})
        # Two changed trees of one commit are not the same.
        same_tree = before.get("commit") == commit() and not commit().endswith("-dirty") and commit() != ""
        if same_tree and before.get("outcome") == "passed" and not options.again:
            print(f"{combination.name}: passed before at this commit", flush=True)
            result = before
        else:
            result = run(combination, folder, options)
            finished[f"{combination.name}: {mode}"] = result
            (folder / "results.json").write_text(json.dumps(finished, indent=2) + "\n", encoding="utf8")
        print(f"{combination.name}: {line_of(result)}", flush=True)
        failed |= result["outcome"] == "failed"
        recorded = _read(RESULTS).get(combination.name, {})
        if (
            options.record
            and result["outcome"] != "skipped"
            and not (options.smoke and recorded.get("what") == "fast tests")
        ):
            RESULTS.write_text(json.dumps(_read(RESULTS) | {combination.name: result}, indent=2) + "\n")
            PAGE.write_text(render(PAGE.read_text(encoding="utf8"), _read(RESULTS)), encoding="utf8")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [combination.name for combination in COMBINATIONS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--smoke", action="store_true", help="scripts/smoke.py in place of the tests")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "matrix", help="environments (.cache/matrix)")
    parser.add_argument("--keep", action="store_true", help="leave the environments, 3 to 7 GB each")
    parser.add_argument("--again", action="store_true", help="also what passed at this commit")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="longest installation; skipped beyond")
    parser.add_argument("--record", action="store_true", help="write results/versions.json and docs/versions.md")
    parser.add_argument("--render", action="store_true", help="only write the table of docs/versions.md again")
    return parser


def run(combination: Combination, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Result of one combination: outcome (passed, failed, skipped), reason, versions, counts, seconds, date, commit."""
    result: dict[str, Any] = {
        "outcome": "skipped",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "what": "smoke" if options.smoke else "fast tests",
    }
    environment = folder / combination.name.replace(" ", "-")
    started = time.monotonic()
    try:
        build(combination, environment, options.limit)
        python = str(environment / "bin" / "python")
        answer = subprocess.run([python, "-c", _VERSIONS % (PACKAGES,)], capture_output=True, text=True, check=True)
        result["versions"] = json.loads(answer.stdout)
        result["install_seconds"] = round(time.monotonic() - started)
        print(f"{combination.name}: {versions_of(result)}", flush=True)
        started = time.monotonic()
        result |= smoke(python) if options.smoke else tests(python)
        result["seconds"] = round(time.monotonic() - started)
    except Skipped as reason:
        result["reason"] = str(reason)
    finally:
        if not options.keep:
            shutil.rmtree(environment, ignore_errors=True)
    return result


def build(combination: Combination, environment: Path, limit: float | None) -> None:
    """Make the environment with this checkout installed editable. Raises Skipped."""
    search = ["sh", str(ROOT / "scripts" / "find_python.sh"), "", str(combination.minor)]
    interpreter = subprocess.run(search, capture_output=True, text=True, check=False)
    if interpreter.returncode:
        raise Skipped(interpreter.stderr.strip().removeprefix("error: "))
    python = environment / "bin" / "python"
    free = shutil.disk_usage(environment.parent).free
    if free < CUDA_BUILD and not python.exists():
        raise Skipped(f"it needs about {CUDA_BUILD / GB:.0f} GB, and {free / GB:.1f} GB are free.")
    print(f"{combination.name}: installing into {environment}, which takes minutes", flush=True)
    made = subprocess.run(
        [interpreter.stdout.strip(), "-m", "venv", str(environment)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise Skipped(f"no environment could be made: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf8") if combination.pins is None else None
    with tempfile.TemporaryDirectory() as temporary:
        constraints = Path(temporary) / "constraints.txt"
        constraints.write_text(pins or "".join(f"{pin}\n" for pin in combination.pins or ()))
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["-c", str(constraints), "-e", f"{ROOT}[dev]"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            raise Skipped(f"the installation was not done after {duration(limit or 0)}.") from None
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Skipped(f"packages are not available: {told[-1].removeprefix('ERROR: ') if told else 'pip failed'}")


def tests(python: str) -> dict[str, Any]:
    """Outcome and counts of the fast tests, with the names of those that failed."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [python, "-m", "pytest", *FAST, f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        if not report.is_file():
            return {"outcome": "failed", "reason": f"pytest ended with {done.returncode}"}
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "outcome": "passed" if done.returncode == 0 else "failed",
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }


def smoke(python: str) -> dict[str, Any]:
    """Outcome of scripts/smoke.py."""
    done = subprocess.run([python, str(ROOT / "scripts" / "smoke.py")], check=False)
    return {"outcome": "failed" if done.returncode else "passed"}


def commit() -> str:
    """Commit of the checkout, with a mark where files were changed since; empty without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions_of(result: dict[str, Any]) -> str:
    """Versions of a result in one line."""
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)


def line_of(result: dict[str, Any]) -> str:
    """A result in one line."""
    if result["outcome"] == "skipped":
        return f"skipped: {result['reason']}"
    counts = [f"{result[key]} {key}" for key in ("passed", "failed", "skipped") if key in result]
    return f"{result['what']} {result['outcome']}: {', '.join([*counts, duration(result['seconds'])])}"


def render(page: str, results: dict[str, Any]) -> str:
    """The page with its generated region written anew."""
    header = ["combination", "Python", *PACKAGES, "fast tests", "date"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for combination in COMBINATIONS:
        result = results.get(combination.name)
        if result is None:
            continue
        versions = result["versions"]
        counts = [f"{result[key]} {key}" for key in ("passed", "failed", "skipped") if result.get(key)]
        told = ", ".join(counts) if result["what"] == "fast tests" else f"smoke {result['outcome']}"
        cells = [combination.name, versions["python"], *(versions[name] or "-" for name in PACKAGES)]
        lines.append(f"| {' | '.join([*cells, told, result['date']])} |")
    text = "\n".join(lines) if len(lines) > 2 else "Nothing has been run yet."
    return REGION.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def _read(path: Path) -> dict[str, Any]:
    """A file of results; nothing where it is not there."""
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
