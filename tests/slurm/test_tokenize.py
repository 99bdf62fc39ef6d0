"""tokenize.sbatch on a real Slurm: an array whose tasks make the shards, and the merge that waits for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.tokenize import tokenize_files
from data_prep.train_tokenizer import train_tokenizer
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARDS = 3


def test_shards_and_their_merge(cluster: Cluster, repository: Path) -> None:
    """A task is killed: the merge does not begin, and the task alone is submitted again."""
    folder = cluster.folder / "tokenized"
    folder.mkdir()
    texts = [path.read_text(encoding="utf8") for path in sorted((repository / "docs").glob("*.md"))]
    train_tokenizer(texts, folder / "set.model", vocab_size=600)
    # Long enough to be killed while it is written.
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) * 40)
    words = (str(folder / "text.jsonl"), "--tokenizer", str(folder / "set.model"), "--output", str(folder / "set"))
    array = cluster.submit("tokenize.sbatch", *words, options=(f"--array=1-{SHARDS}", "--time=30"))
    merging = ("merge", str(folder / "set"))
    merge = cluster.submit("tokenize.sbatch", *merging, options=(f"--dependency=afterok:{array}", "--time=30"))
    partial = folder / f"set.shard-2-of-{SHARDS}.bin.partial"
    cluster.until(lambda: partial.exists() and partial.stat().st_size, f"{array}_2")
    cluster.call("scancel", "--batch", "--signal=KILL", f"{array}_2")
    assert cluster.wait(f"{array}_2")["JobState"] == "FAILED"
    for number in (1, SHARDS):
        job = cluster.wait(f"{array}_{number}")
        assert job["JobState"] == "COMPLETED"
        assert f"job {array}_{number}: shard {number} of {SHARDS}" in cluster.output(job["JobId"])
    assert cluster.wait(merge)["JobState"] == "CANCELLED"
    assert not (folder / "set.bin").exists()

    alone = cluster.submit("tokenize.sbatch", *words, options=("--array=2", "--time=30"))
    job = cluster.wait(f"{alone}_2")
    assert job["ExitCode"] == "2:0" and "the array is not --array=1-N" in cluster.output(job["JobId"])
    finished = (folder / f"set.shard-1-of-{SHARDS}.bin").stat().st_mtime_ns
    again = cluster.submit("tokenize.sbatch", *words, options=("--array=1-2", "--time=30"), SEPLLM_SHARDS=str(SHARDS))
    merge = cluster.submit("tokenize.sbatch", *merging, options=(f"--dependency=afterok:{again}", "--time=30"))
    assert cluster.wait(merge)["JobState"] == "COMPLETED", cluster.output(merge)
    assert f"{SHARDS} shards were merged" in cluster.output(merge)
    assert (folder / f"set.shard-1-of-{SHARDS}.bin").stat().st_mtime_ns == finished

    tokenize_files([folder / "text.jsonl"], folder / "one" / "set", folder / "set.model", progress=False)
    for suffix in (".bin", ".idx", ".sep.bin", ".sep.json"):
        assert (folder / f"set{suffix}").read_bytes() == (folder / "one" / f"set{suffix}").read_bytes()


def test_a_job_that_is_no_array(cluster: Cluster) -> None:
    job = cluster.submit("tokenize.sbatch", "text.jsonl", "--output", "set")
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "shards are made by an array: sbatch --array=1-N" in cluster.output(job)
