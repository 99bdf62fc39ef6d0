"""Make a W&B workspace that compares runs: losses over FLOPs, time and tokens, speed, attention, each layer.

python scripts/dashboard.py --entity ME --group first --dry-run first.json
python scripts/dashboard.py --entity ME --group dense sep --name "dense against sep"
"""

import check_environment  # noqa: F401

from sepllm_train.base.errors import exit_on_user_error
from sepllm_train.dashboard import main

if __name__ == "__main__":
    exit_on_user_error(main)
