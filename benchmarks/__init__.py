"""Benchmarks of the checkout, each beside its baseline in one process: python -m benchmarks.training --help

Run them in the root of the checkout. The project's packages are those of this checkout, whatever is installed, and an
environment that cannot run them ends the program with one message.
"""

import sys
from pathlib import Path

from sepllm_train import requirements

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "kernels"))
requirements.end_if_unsound(ROOT)
