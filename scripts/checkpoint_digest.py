"""Prints the digest of a checkpoint: equal digests are bitwise equal states of training, wall-clock aside.

python scripts/checkpoint_digest.py runs/first
python scripts/checkpoint_digest.py --each runs/first/checkpoints/step_00000100
"""

from __future__ import annotations

import check_environment  # noqa: F401

import argparse
from pathlib import Path

from sepllm_train.base.errors import exit_on_user_error
from sepllm_train.training.checkpoint import digest, digests


def main() -> None:
    """Print the digest of each checkpoint given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a run folder (its newest whole checkpoint) or a checkpoint"
    )
    parser.add_argument("--each", action="store_true", help="one line for every tensor and counter")
    arguments = parser.parse_args()
    for path in arguments.paths:
        lines = digests(Path(path)) if arguments.each else [(path, digest(Path(path)))]
        for name, value in lines:
            print(f"{value}  {name}")


if __name__ == "__main__":
    exit_on_user_error(main)
