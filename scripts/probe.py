"""Is a separator a summary of its segment, or a sink?

python scripts/probe.py text books.jsonl --tokenizer data/books.tokenizer.model --output data/facts.jsonl
python scripts/probe.py ask runs/probe_seed1 runs/probe_seed2 runs/probe_seed3 --text unseen.txt --output runs/probe
"""

import check_environment  # noqa: F401

from sepllm_train.analysis.probe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
