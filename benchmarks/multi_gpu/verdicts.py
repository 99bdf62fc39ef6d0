"""Compares the record of a case with what it should be: status, message and the figures behind them.

Bars of losses and gradient norms, relative to the baseline, the largest of all steps:

fp32  1e-5 for both: the order of sums over ranks changes the last bits of 24, and a few steps keep it there.
bf16  1e-3 for losses, 1e-2 for gradient norms. A bf16 value has 8 significant bits, so every activation is rounded by
      up to 2^-9 = 2e-3, and layouts round partial sums at other places. The loss is an fp32 mean over the batch, in
      which these average out; gradients collect them over all layers. Small models on CPUs differ by 1e-4 and
      1e-3; the bars are ten times that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.multi_gpu.cases import Case
from benchmarks.multi_gpu.results import FAILED, PASSED
from sepllm_train.base.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK

# Precision -> (losses, gradient norms).
BARS = {"fp32": (1e-5, 1e-5), "bf16": (1e-3, 1e-2)}
# Exit code of the launcher after each signal: the killed rank's own, or that of a rank which missed it first; saved.
KILLED = (128 + 9, EXIT_LOST_RANK)
EXPECTED_CODES = {"SIGKILL": KILLED, "SIGTERM": (EXIT_INTERRUPTED,), "SIGUSR1": (EXIT_INTERRUPTED,)}


@dataclass(frozen=True)
class Verdict:
    """Status of a case, a message for the table, and the figures behind it."""

    status: str
    message: str
    figures: dict[str, Any] = field(default_factory=dict)


def judge(case: Case, runs: dict[str, Any], baseline: dict[str, Any] | None) -> Verdict:
    """Verdict of a case from what its `runs` gave and the record of its baseline (None where that did not pass)."""
    if case.baseline is not None and baseline is None:
        return Verdict(FAILED, f"nothing to compare with: {case.baseline} has not passed")
    if case.kind == "environment":
        return _environment(runs)
    if case.kind == "kill":
        return _kill(runs)
    if case.kind == "time":
        return _time(case, runs, baseline)
    if case.stage == "layouts":
        found = runs["run"]
        return _one_gpu(found) if baseline is None else compare_runs(found, baseline["runs"]["run"], case.precision)
    if case.stage == "overlap":
        return compare_runs(runs["overlap_true"], runs["overlap_false"], case.precision)
    return _resume(runs, case.precision)


def compare_runs(found: dict[str, Any], expected: dict[str, Any], precision: str) -> Verdict:
    """Compare losses and gradient norms step by step with the bars of a precision."""
    figures: dict[str, Any] = {}
    over = []
    for (name, key), bar in zip((("loss", "losses"), ("gradient norm", "norms")), BARS[precision], strict=True):
        if len(found[key]) != len(expected[key]) or not expected[key]:
            return Verdict(FAILED, f"{len(found[key])} steps have a {name}, the baseline has {len(expected[key])}")
        differences = relative_differences(found[key], expected[key])
        largest = max(differences)
        figures[f"{key}_difference"], figures[f"{key}_bar"] = largest, bar
        # Written so that nan is over the bar.
        if not largest <= bar:
            step = next(number for number, value in enumerate(differences, 1) if not value <= bar)
            over.append(f"{name} off by {largest:.1e} from step {step} on, the bar is {bar:.1e}")
    figures["bitwise"] = all(found[key] == expected[key] for key in ("losses", "norms"))
    if over:
        return Verdict(FAILED, "; ".join(over), figures)
    text = "bitwise equal" if figures["bitwise"] else "loss {losses_difference:.1e}, norm {norms_difference:.1e}"
    return Verdict(PASSED, text.format(**figures), figures)


def _one_gpu(found: dict[str, Any]) -> Verdict:
    """The run that the layouts are compared with is usable."""
    if not all(value is not None and math.isfinite(value) for key in ("losses", "norms") for value in found[key]):
        return Verdict(FAILED, "a loss or gradient norm is not finite")
    return Verdict(PASSED, f"baseline, loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}")


def relative_differences(found: Sequence[float | None], expected: Sequence[float | None]) -> list[float]:
    """|found - expected| / |expected| of each step; inf where a value is missing or not finite."""
    result = []
    for one, other in zip(found, expected, strict=True):
        usable = one is not None and other is not None and math.isfinite(one) and math.isfinite(other)
        result.append(abs(one - other) / max(abs(other), 1e-30) if usable else math.inf)  # type: ignore[operator,arg-type]
    return result


def _environment(runs: dict[str, Any]) -> Verdict:
    """All-reduces gave the right sums."""
    tests = runs["self_test"]
    errors = [f"{name}: {test['error']}" for name, test in tests.items() if "error" in test]
    if errors:
        return Verdict(FAILED, "all-reduce fails, " + "; ".join(errors), {"advice": runs["advice"]})
    rates = {name: test.get("gigabytes_per_second") for name, test in tests.items()}
    text = ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items() if rate is not None)
    return Verdict(PASSED, f"all-reduce: {text}", {"gigabytes_per_second": rates, "advice": runs["advice"]})


def _resume(runs: dict[str, Any], precision: str) -> Verdict:
    """The second half of a run again: losses and norms within the bars, and the same digest in the same layout."""
    whole, again = runs["whole"], runs["again"]
    half = len(whole["losses"]) // 2
    tail = {key: whole[key][half:] for key in ("losses", "norms")}
    compared = compare_runs(again, tail, precision)
    if "digest" not in whole:
        return compared
    figures = {**compared.figures, "digest": again["digest"], "expected_digest": whole["digest"]}
    if again["digest"] == whole["digest"] and compared.status == PASSED:
        return Verdict(PASSED, f"digest {again['digest'][:12]} equal", figures)
    text = f"digest {again['digest'][:12]}, uninterrupted {whole['digest'][:12]}"
    return Verdict(FAILED, f"{text}; {compared.message}", figures)


def _kill(runs: dict[str, Any]) -> Verdict:
    """Each signal ended the launch in time with a documented code, and the last state is the undisturbed one."""
    wrong = []
    for event in runs["events"]:
        expected = EXPECTED_CODES[event["signal"]]
        if event["code"] not in expected:
            codes = " or ".join(map(str, expected))
            ended = "did not end in time" if event["code"] is None else f"ended with {event['code']}"
            wrong.append(f"{event['signal']} at step {event['step']}: the launch {ended}, {codes} is documented")
    if "error" in runs:
        wrong.append(runs["error"])
    elif runs["digest"] != runs["expected_digest"]:
        wrong.append(f"digest {runs['digest'][:12]}, undisturbed {runs['expected_digest'][:12]}")
    figures = {f"{event['signal']} seconds to the end": event["seconds"] for event in runs["events"]}
    if wrong:
        return Verdict(FAILED, "; ".join(wrong), figures)
    text = ", ".join(f"{event['signal']} -> {event['code']} in {event['seconds']:.0f}s" for event in runs["events"])
    return Verdict(PASSED, f"{text}; digest {runs['digest'][:12]} equal", figures)


def _time(case: Case, runs: dict[str, Any], baseline: dict[str, Any] | None) -> Verdict:
    """Tokens per second, and their ratio to the baseline: the other run of the rounds, or the baseline's case."""
    rates = {name: run["tokens_per_second"] for name, run in runs.items()}
    if case.stage == "overlap":
        pairs = zip(runs["overlap_false"]["seconds"], runs["overlap_true"]["seconds"], strict=True)
        ratios = [off / on for off, on in pairs]
        figures: dict[str, Any] = {"tokens_per_second": rates, "ratio": statistics.median(ratios), "ratios": ratios}
        off, on = rates["overlap_false"], rates["overlap_true"]
        return Verdict(PASSED, f"{off:,.0f} to {on:,.0f} tokens/s, {figures['ratio']:.3f}x", figures)
    (run,) = runs.values()
    rate, memory = run["tokens_per_second"], run["memory_bytes"]
    figures = {"tokens_per_second": rate, "memory_bytes": memory}
    text = f"{rate:,.0f} tokens/s"
    if baseline is not None:
        figures["ratio"] = rate / baseline["figures"]["tokens_per_second"]
        if case.stage == "scaling":
            figures["efficiency"] = figures["ratio"] / case.processes
            text += f", efficiency {figures['efficiency']:.1%}"
        else:
            text += f", {figures['ratio']:.2f}x of {case.baseline}"
    return Verdict(PASSED, text + (f", peak {memory / 2**30:.1f} GiB" if memory else ""), figures)
