"""Run a reference revision and the working tree on this machine, and compare what they compute bit by bit.

    make golden
    make golden GOLDEN='--cases dense sep resume'
    python -m tests.golden --reference HEAD~1 --output golden

Exit code 0 when every case is equal, 1 when one is not or fails, 2 for a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests.golden.archives import unpack
from tests.golden.cases import BY_NAME, CASES, Case, with_needs
from tests.golden.compare import SHOWN, differences, flatten, largest
from tests.golden.sides import REPOSITORY, BadInput, Processes, Side, check_versions, commit_of, fingerprint, worktree

# The last revision before work that must keep every result.
REFERENCE = "b31b21f"
SIDES = ("reference", "working")


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    arguments = parser().parse_args(words)
    if arguments.list:
        print("\n".join(f"{case.name:22} {case.job['kind']}, {case.ranks} rank(s)" for case in CASES))
        return 0
    try:
        names = known(arguments.cases)
        commit = commit_of(arguments.reference)
        if arguments.output.exists() and not arguments.output.is_dir():
            raise BadInput(f"--output {arguments.output} is a file: name a folder.")
        unequal = run(names, commit, arguments.output, arguments.jobs)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the cases of the reference that had finished are kept.", file=sys.stderr)
        return 130
    return 1 if unequal else 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m tests.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--reference", default=REFERENCE, metavar="REV", help="revision to compare with (%(default)s)")
    made.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="these cases alone (default: all)")
    made.add_argument("--list", action="store_true", help="list the cases and stop")
    made.add_argument("--output", type=Path, default=REPOSITORY / ".cache" / "golden", metavar="DIR",
                      help="where reference.json and working.json are kept (.cache/golden); the first is used again "
                      "as long as nothing that it depends on has changed")  # fmt: skip
    made.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time (%(default)s)")
    return made


def known(names: list[str]) -> list[str]:
    """The names of all cases to compare. Raises BadInput for one that there is not."""
    for name in names:
        if name not in BY_NAME:
            raise BadInput(f"--cases {name} is unknown: choose from {', '.join(BY_NAME)}.")
    return names or list(BY_NAME)


def run(names: list[str], commit: str, output: Path, jobs: int) -> list[str]:
    """Run and compare cases; return the names of those that are not equal. Raises BadInput."""
    output.mkdir(parents=True, exist_ok=True)
    prints = fingerprint(commit)
    stored = read_outcomes(output / "reference.json", prints)
    missing = with_needs([name for name in names if name not in stored])
    if missing:
        check_versions(commit)
    kept = sum(name in stored for name in names)
    print(f"{len(names)} cases, {jobs} at a time | reference {commit[:7]}" + (f", {kept} cases kept" if kept else ""))
    processes = Processes()
    with tempfile.TemporaryDirectory(prefix="golden_", ignore_cleanup_errors=True) as root, interruptible():
        place = Path(root)
        with worktree(commit, place / "tree") if missing else nullcontext(place) as tree:
            sides = [
                Side(name, path, place / name, processes) for name, path in zip(SIDES, (tree, REPOSITORY), strict=True)
            ]
            for side in sides:
                side.folder.mkdir()
                unpack("data", side.folder)
            sides[0].outcomes.update(stored)
            plan = [(sides[0], case) for case in missing] + [(sides[1], case) for case in with_needs(names)]
            # A case of one side beside the same case of the other.
            plan.sort(key=lambda one: CASES.index(one[1]))
            try:
                return compare_as_they_end(plan, sides, names, jobs)
            finally:
                processes.stop()
                write_outcomes(output / "reference.json", prints, sides[0])
                write_outcomes(output / "working.json", prints | {"commit": "working tree"}, sides[1])


def compare_as_they_end(plan: list[tuple[Side, Case]], sides: list[Side], names: list[str], jobs: int) -> list[str]:
    """Run `plan`, and print a line for each case when both of its sides have ended; return the unequal ones."""
    began, spent, total = time.monotonic(), 0, sum(case.cost for _, case in plan)
    waiting, unequal = list(names), []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            costs = submit(plan, pool)
            for future in as_completed(costs):
                future.result()
                spent += costs[future]
                for name in [name for name in waiting if all(name in side.outcomes for side in sides)]:
                    waiting.remove(name)
                    equal, lines = judge(*(side.outcomes[name] for side in sides))
                    unequal += [] if equal else [name]
                    seconds = time.monotonic() - began
                    left = seconds / spent * (total - spent)
                    head = f"[{len(names) - len(waiting):2}/{len(names)}] {name}: {lines[0]}"
                    shown = [f"{head} | {seconds:.0f} s, about {left:.0f} s left", *lines[1:]]
                    print("\n        ".join(shown), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            sides[0].processes.stop()
            raise
    print(f"not equal: {', '.join(unequal)}" if unequal else f"all {len(names)} cases are equal")
    return unequal


def submit(plan: list[tuple[Side, Case]], pool: ThreadPoolExecutor) -> dict[Future[None], int]:
    """Start a plan in its order, so that a case that waits for what it needs waits for cases that have begun; return
    the cost of each."""
    costs = {}
    for side, case in plan:
        side.outcomes.pop(case.name, None)
        side.futures[case.name] = pool.submit(side.run, case)
        costs[side.futures[case.name]] = case.cost
    return costs


def judge(reference: dict[str, Any], working: dict[str, Any]) -> tuple[bool, list[str]]:
    """Return whether a case is equal, and the lines to print: the verdict, then what differs."""
    both = zip(SIDES, (reference, working), strict=True)
    if errors := [f"{side} failed: {one['error']}" for side, one in both if "error" in one]:
        return False, ["FAILED", *errors]
    values = len(list(flatten(reference["outcome"])))
    found = differences(reference["outcome"], working["outcome"])
    if not found:
        return True, [f"equal ({values} values)"]
    more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    most = largest(reference["outcome"], working["outcome"])
    return False, [f"DIFFERS in {len(found)} of {values} values", *found[:SHOWN], *more, *([most] if most else [])]


def read_outcomes(path: Path, prints: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Outcomes that are kept in a file, unless they were made in other circumstances or failed."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        cases = content["cases"] if content["made_with"] == prints else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: one for name, one in cases.items() if "outcome" in one}


def write_outcomes(path: Path, prints: dict[str, str], side: Side) -> None:
    """Keep the outcomes of a side."""
    cases = {name: side.outcomes[name] for name in BY_NAME if name in side.outcomes}
    path.write_text(json.dumps({"made_with": prints, "cases": cases}, indent=1) + "\n", encoding="utf8")


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, with everything removed."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
