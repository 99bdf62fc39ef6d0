"""pretrain.sbatch and sweep.sbatch on a real Slurm."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from sepllm_train.training.checkpoint import digest
from sepllm_train.training.requeue import decide
from tests.slurm.cluster import Cluster, records
from tests.support.small_run import SMALL_MODEL

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Enough that a run is still training when its first record has been seen and acted on.
STEPS = 150
SMALL = (
    *SMALL_MODEL,
    f"training.steps={STEPS}",
    "training.validation_interval=0",
    "training.checkpoint_interval=0",
)


@pytest.fixture(scope="module")
def small(cluster: Cluster, sample_cache: Path) -> tuple[str, ...]:
    """Overrides of a run that takes seconds."""
    return (*SMALL, f"run_root={cluster.folder}/runs", f"data.cache={sample_cache}")


def status(folder: Path) -> str:
    """Status of a run."""
    return str(json.loads((folder / "run.json").read_text())["status"])


def ranks(name: str) -> list[int]:
    """Processes that train the run of that name."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if f"name={name}" in words and words[1:3] == ["-u", "scripts/pretrain.py"]:
            found.append(int(entry.name))
    return found


def test_time_limit_saves_requeues_and_resumes_bitwise(cluster: Cluster, small: tuple[str, ...]) -> None:
    """Two nodes of one process each, against a run of the same layout that nothing disturbs."""
    runs = cluster.folder / "runs"
    nodes = ("--nodes=2", "--time=30")
    limited = cluster.submit(
        "pretrain.sbatch", "+experiment=demo_sep", *small, "name=limited", options=(*nodes, "--signal=B:USR1@120")
    )
    undisturbed = cluster.submit("pretrain.sbatch", "+experiment=demo_sep", *small, "name=undisturbed", options=nodes)
    cluster.until(lambda: records(runs / "limited"), limited)
    # Slurm looks at time limits twice a minute: until then the run stands still.
    cluster.call("scancel", "--signal=STOP", limited)
    minutes = int(cluster.job(limited)["RunTime"].split(":")[1])
    cluster.call("scontrol", "update", f"JobId={limited}", f"TimeLimit={minutes + 2}")
    cluster.until(lambda: "the time limit is near" in cluster.output(limited), limited)
    cluster.call("scontrol", "update", f"JobId={limited}", "TimeLimit=30")
    cluster.call("scancel", "--signal=CONT", limited)
    assert cluster.wait(limited)["JobState"] == "COMPLETED"
    assert cluster.wait(undisturbed)["JobState"] == "COMPLETED"
    assert (cluster.job(limited)["Restarts"], cluster.job(undisturbed)["Restarts"]) == ("1", "0")

    output = cluster.output(limited)
    (stopped,) = [int(line.split("step ")[1].split()[0]) for line in output.splitlines() if line.startswith("requeued")]
    assert 0 < stopped < STEPS
    assert f"step_{stopped:08d}" in output.split("resumed from")[1].splitlines()[0]
    names = ("limited", "undisturbed")
    for key, steps in (("train/loss", [*range(1, STEPS + 1)]), ("train/grad_norm", None), ("val/loss", [STEPS])):
        values = [{record["step"]: record[key] for record in records(runs / name) if key in record} for name in names]
        assert values[0] == values[1] and (steps is None or list(values[0]) == steps), key
    assert digest(runs / "limited") == digest(runs / "undisturbed")
    assert status(runs / "limited") == "finished"

    # As if the job were interrupted again: it has got further, then it has not.
    assert decide(runs / "limited", limited)[0]
    again, reason = decide(runs / "limited", limited)
    assert not again and f"step {STEPS}, as when job {limited} was requeued before" in reason
    assert decide(runs / "limited", "another job")[0]


def test_array(cluster: Cluster, small: tuple[str, ...]) -> None:
    """A run that loses a rank, one that is cancelled, a mistake, and one that Slurm interrupts.

    The last one shares its number with the whole array. It and the cancelled one would go on for ever.
    """
    runs = cluster.folder / "runs"
    listed = cluster.folder / "runs.txt"
    listed.write_text(
        "# rates\n"
        "+experiment=demo_dense name=killed training.checkpoint_interval=10\n\n"
        "+experiment=demo_sep name=cancelled training.steps=100000\n"
        "+experiment=demo_sep name=wrong attention.windw=7\n"
        "  +experiment=demo_sep 'attention.separators=[period, comma]' name=signalled training.steps=100000\n"
    )
    array = cluster.submit("sweep.sbatch", str(listed), *small, options=("--array=1-4", "--time=30"),
                           SEPLLM_REQUEUE_CRASHES="1")  # fmt: skip
    killed, cancelled, wrong, signalled = (f"{array}_{number}" for number in range(1, 5))
    cluster.until(lambda: len(records(runs / "killed")) > 10, killed)
    os.kill(ranks("killed")[0], signal.SIGKILL)
    cluster.until(lambda: records(runs / "signalled"), signalled)
    cluster.call("scancel", "--batch", "--signal=USR1", signalled)
    cluster.until(lambda: records(runs / "cancelled"), cancelled)
    cluster.call("scancel", cancelled)

    assert cluster.wait(wrong)["ExitCode"] == "2:0"
    assert "there is no key attention.windw (did you mean attention.window?)" in cluster.output(wrong)
    assert "exit code 2 and is not requeued" in cluster.output(wrong)
    assert cluster.wait(cancelled)["JobState"] == "CANCELLED"
    assert status(runs / "cancelled") == "interrupted"
    cluster.until(lambda: "resumed from" in cluster.output(signalled), signalled)
    cluster.call("scancel", signalled)
    assert cluster.wait(signalled)["JobState"] == "CANCELLED"
    assert cluster.wait(killed)["JobState"] == "COMPLETED", cluster.output(killed)
    assert status(runs / "killed") == "finished" and records(runs / "killed")[-1]["step"] == STEPS
    assert "was killed by SIGKILL" in cluster.output(killed)
    # Only the tasks that were meant: the first number of an array is also that of one of its tasks.
    restarts = {job: cluster.job(job)["Restarts"] for job in (killed, cancelled, wrong, signalled)}
    assert restarts == {killed: "1", cancelled: "0", wrong: "0", signalled: "1"}
    assert cluster.output(cancelled).count("attempt") == 1


def test_array_beyond_the_list(cluster: Cluster) -> None:
    array = cluster.submit("sweep.sbatch", "demo_dense", "demo_sep", "--", "name=x", options=("--array=3",))
    assert cluster.wait(f"{array}_3")["ExitCode"] == "2:0"
    assert "there is no run 3: the command line names 2, so the array is --array=1-2." in cluster.output(f"{array}_3")
