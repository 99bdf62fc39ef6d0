"""The paper's tables from results of scripts/evaluate.py.

python scripts/report_eval.py evaluation/dense evaluation/sep --output evaluation/table.md
"""

import check_environment  # noqa: F401

from sepllm_train.evaluation.report import main

if __name__ == "__main__":
    main()
