"""Continues prompts with a run's own checkpoints, in one process or tensor parallel.

python scripts/generate.py runs/NAME --prompt "Once upon a time" --tokens 200
torchrun --nproc-per-node=2 scripts/generate.py runs/NAME --tensor 2 --prompt-file prompts.txt --temperature 0.8 --top-p 0.95 --seed 1
"""  # noqa: E501

import check_environment  # noqa: F401

from sepllm_train.generation.cli import main

if __name__ == "__main__":
    main()
