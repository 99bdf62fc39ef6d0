"""Texts without end: perplexity token by token, and generation that goes on.

python scripts/stream.py score runs/NAME --text books.jsonl.bz2 --tokens 4194304 --output streams/sep
python scripts/stream.py chat runs/NAME --temperature 0.8
python scripts/stream.py report streams/sep streams/streaming --at 1048576,4194304
"""

import check_environment  # noqa: F401

from sepllm_train.evaluation.stream_cli import main

if __name__ == "__main__":
    raise SystemExit(main())
