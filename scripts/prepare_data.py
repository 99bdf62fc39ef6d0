"""Prepare data: tokenize, annotate, train-tokenizer, stats, verify.

python scripts/prepare_data.py --help
python scripts/prepare_data.py tokenize books/*.txt --tokenizer tokenizer.json --output data/books
"""

import check_environment  # noqa: F401

import sys

from data_prep.cli import main

if __name__ == "__main__":
    sys.exit(main())
