"""Write the archives of tests/golden with the programs of an old revision.

    git worktree add --detach OLD b31b21f
    python -m tests.golden.make_files OLD data tests/golden/files
    python -m tests.golden.make_files OLD runs tests/golden/files

b31b21f wrote their files once. They are not written again: they stand for what users have on their disks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.golden.archives import pack, unpack

# Real text that was written for this project. The rest of docs/ would only make the files larger.
TEXTS = {
    "guide": ["README.md", "docs/data.md", "docs/attention.md", "docs/flops.md", "docs/inference.md"],
    "notes": ["docs/comparison.md", "docs/suites.md", "CHANGELOG.md"],
}
# 640 entries in one process and 768 with tensor parallelism of 2 once padded: neither is a multiple of 128.
VOCABULARY = 600
# Small enough to be committed with its optimizer.
STORED_RUN = (
    "+experiment=demo_sep",
    "model.layers=2",
    "model.hidden=16",
    "model.heads=2",
    "model.ffn=32",
    "attention.window=16",
    "data.sequence_length=128",
    "data.validation_fraction=0.1",
    "data.workers=0",
    "training.steps=4",
    "training.validation_interval=2",
    "training.checkpoint_interval=2",
    "training.keep_checkpoints=1",
    "seed=7",
)

# Run with the old tree on the path: what the stored files hold, as that revision reads them.
EXPECTED = """
import json, torch
from sepllm_train.hf import load_model
from sepllm_train.training.checkpoint import digests

ids = [7 * number % 599 + 1 for number in range(48)]
with torch.no_grad():
    logits = load_model("export")(torch.tensor([ids])).logits[0]
records = [json.loads(line) for line in open("runs/again/metrics.jsonl")]
expected = {
    "checkpoint": dict(digests("runs/run")),
    "loss of step 5": next(record["train/loss"] for record in records if "train/loss" in record),
    "ids": ids,
    # Every fourth token, every fortieth entry of the vocabulary.
    "logits": logits[::4, ::40].tolist(),
}
open("expected.json", "w").write(json.dumps(expected, indent=1) + chr(10))
"""


def main() -> None:
    """Write the data, or the run, the export and the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="worktree of the old revision")
    parser.add_argument("what", choices=("data", "runs"))
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    make = make_data if arguments.what == "data" else make_runs
    make(arguments.tree.resolve(), output)


def run(tree: Path, folder: Path, *words: str) -> None:
    """Run Python in `folder` with nothing but `tree` on the path; a name of a script is one of the tree."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}",
        "SEPLLM_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    script = [str(tree / "scripts" / words[0])] if words[0].endswith(".py") else [words[0]]
    subprocess.run([sys.executable, *script, *words[1:]], cwd=folder, env=environment, check=True)


def make_data(tree: Path, output: Path) -> None:
    """Tokenise the texts, a document for each section, with a tokenizer that is trained on them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The evaluation tasks were written by hand.
        shutil.copytree(unpack("data", folder / "stored") / "tasks", folder / "data" / "tasks")
        for text, pages in TEXTS.items():
            sections = [part for page in pages for part in (tree / page).read_text(encoding="utf8").split("\n## ")]
            lines = [json.dumps({"text": section}) + "\n" for section in sections]
            (folder / f"{text}.jsonl").write_text("".join(lines), encoding="utf8")
        inputs = [f"{text}.jsonl" for text in TEXTS]
        run(tree, folder, "prepare_data.py", "train-tokenizer", *inputs, f"--vocab-size={VOCABULARY}",
            "--output=golden.model", "--workers=1")  # fmt: skip
        for text in TEXTS:
            run(tree, folder, "prepare_data.py", "tokenize", f"{text}.jsonl", "--tokenizer=golden.model",
                f"--output=data/{text}")  # fmt: skip
        pack(folder / "data", output)


def make_runs(tree: Path, output: Path) -> None:
    """Train the stored run, export it, train the stored suite, and record what a reader must find in them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Under a relative path, so that no stored file names a folder of this machine.
        unpack("data", folder)
        data = ("data=prefixes", "data.prefixes=[data/guide]")
        run(tree, folder, "pretrain.py", *STORED_RUN, *data, "name=run")
        shutil.copytree(folder / "runs" / "run", folder / "run")
        run(tree, folder, "pretrain.py", *STORED_RUN, *data, "name=again", "resume=runs/run", "training.steps=5")
        run(tree, folder, "export_hf.py", "runs/run", "export")
        run(tree, folder, "suite.py", "+suite=paper", "suite.size=toy", "suite.lengths=[128]", "suite.seeds=[1]",
            "suite.prefix=data/guide", "suite.only.rows=[dense,sep]", "suite.do=[train,evaluate,report]",
            "suite.export=suite/paper-toy")  # fmt: skip
        run(tree, folder, "-c", EXPECTED)
        anonymous(folder / "run" / "environment.json")
        for kept in ("run", "export", "suite"):
            pack(folder / kept, output)
        shutil.copy(folder / "expected.json", output / "expected.json")


def anonymous(path: Path) -> None:
    """Leave the machine's name and folders out of environment.json."""
    content = json.loads(path.read_text())
    content |= {"host": "host", "command": ["scripts/pretrain.py", *content["command"][1:]]}
    path.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
