"""Versions, GPUs, memory, disks, limits, variables and an all-reduce, with advice: attach it to a report of a fault.

python scripts/env_report.py
python scripts/env_report.py --json
torchrun --nproc-per-node=8 scripts/env_report.py
"""

from sepllm_train.environment import main

if __name__ == "__main__":
    raise SystemExit(main())
