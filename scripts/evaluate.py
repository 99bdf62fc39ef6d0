"""The paper's tasks through lm-evaluation-harness, under the separator pattern, a cache, or baselines.

python scripts/evaluate.py runs/pythia160m_sep --tasks lambada,piqa --data-dir data/eval --baselines paper
python scripts/evaluate.py models/pythia-160m --tasks gsm8k_cot --attention cache --window 256 --capacity 800
torchrun --standalone --nproc-per-node=2 scripts/evaluate.py runs/pythia160m_sep --tasks arc_easy --output results
"""

import check_environment  # noqa: F401

from sepllm_train.evaluation.cli import main

if __name__ == "__main__":
    main()
