"""What separators do: in a corpus, in the attention of a trained model, and in its loss.

python scripts/analyze_separators.py corpus data/books --output analysis/corpus
python scripts/analyze_separators.py attention runs/books_sep --output analysis/attention
python scripts/analyze_separators.py loss runs/books_sep --drop-classes --windows 16,64,256 --output analysis/loss
python scripts/analyze_separators.py ablate runs/books_dense --window 64 --output analysis/ablation
"""

import check_environment  # noqa: F401

from sepllm_train.analysis.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
