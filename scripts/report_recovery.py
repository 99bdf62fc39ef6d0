"""What post-training recovered of the loss that a model loses when it gets another attention pattern.

python scripts/report_recovery.py runs/posttrain_pythia1.4b --continued runs/dense_on --output analysis/recovery
python scripts/report_recovery.py runs/posttrain runs/posttrain_larger_lr --windows 16,32,64 --samples 64
"""

import check_environment  # noqa: F401

from sepllm_train.analysis.cli import recovery_main

if __name__ == "__main__":
    raise SystemExit(recovery_main())
