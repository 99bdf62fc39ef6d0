"""Pretrain a GPT with separator attention.

torchrun --standalone scripts/pretrain.py +experiment=demo_sep
torchrun --nproc-per-node=8 scripts/pretrain.py +experiment=pythia160m_sep
"""

import check_environment  # noqa: F401

from sepllm_train.pretrain import main

if __name__ == "__main__":
    main()
