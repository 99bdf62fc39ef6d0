"""Compare training runs, one or several seeds of each: loss against FLOPs, against seconds and against tokens.

python scripts/compare_runs.py runs/demo_dense runs/demo_sep --output runs/comparison
"""

import check_environment  # noqa: F401

from sepllm_train.compare_runs import main

if __name__ == "__main__":
    raise SystemExit(main())
