"""Pretrain a GPT with separator attention: `sepllm pretrain`, as torchrun's target.

sepllm pretrain +experiment=demo_sep
sepllm pretrain --nproc 8 +experiment=pythia160m_sep
"""

import check_environment  # noqa: F401

import sys

from sepllm_train.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
