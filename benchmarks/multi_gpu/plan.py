"""Choice of the cases that fit a time budget, and their launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.multi_gpu.cases import Case


@dataclass(frozen=True)
class LaunchGroup:
    """Cases of one launch, in order; those of kinds "environment" and "kill" start their own processes."""

    processes: int
    kind: str
    cases: tuple[Case, ...]


def launch_key(case: Case) -> tuple[int, int]:
    """Cases with the same key share a launch; launches run in the order of their keys.

    One GPU comes first, for it is the baseline of others; then what is compared, what is killed, and what is timed.
    """
    if case.kind == "environment":
        return (0, 0)
    if case.processes == 1:
        return (1, 1)
    return ({"train": 2, "kill": 3}.get(case.kind, 4), -case.processes)


def launches_of(cases: Sequence[Case]) -> list[LaunchGroup]:
    """Group cases into launches; inside a launch the important ones first, baselines before what they are for."""
    groups: dict[tuple[int, int], list[Case]] = {}
    for case in sorted(cases, key=lambda case: (launch_key(case), case.priority, case.baseline is not None)):
        groups.setdefault(launch_key(case), []).append(case)
    return [
        LaunchGroup(
            group[0].processes, group[0].kind if group[0].kind in ("environment", "kill") else "worker", tuple(group)
        )
        for group in groups.values()
    ]


def estimate(cases: Sequence[Case], launch_seconds: float) -> float:
    """Seconds that the cases take, their launches included."""
    return sum(case.seconds for case in cases) + launch_seconds * sum(
        launch.kind == "worker" for launch in launches_of(cases)
    )


def within_budget(
    cases: Sequence[Case], seconds: float, launch_seconds: float, done: frozenset[str] = frozenset()
) -> tuple[list[Case], list[Case]]:
    """(cases that fit into `seconds`, cases that are left out), each in the given order.

    Cases are taken by priority while the estimate allows, smaller ones also after a larger one did not fit. A case
    without its baseline is left out; the ids in `done` are baselines that exist already.
    """
    order = {case.id: number for number, case in enumerate(cases)}
    chosen: list[Case] = []
    names = set(done)
    for case in sorted(cases, key=lambda case: (case.priority, case.baseline is not None, order[case.id])):
        has_baseline = case.baseline_id is None or case.baseline_id in names
        if has_baseline and estimate([*chosen, case], launch_seconds) <= seconds:
            chosen.append(case)
            names.add(case.id)
    taken = {case.id for case in chosen}
    return [case for case in cases if case.id in taken], [case for case in cases if case.id not in taken]
