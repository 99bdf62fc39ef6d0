"""Train the rows of a suite on the same data in the same order and report what each costs.

    python scripts/suite.py +suite=paper suite.size=cpu 'suite.text=[books.jsonl.bz2]'
    python scripts/suite.py +suite=paper suite.size=gpu suite.prefix=data/books
    python scripts/suite.py +suite=paper suite.prefix=data/books 'suite.only.seeds=[1]' suite.jobs=2

The same command typed again continues. Every key: sepllm_train/suite/config.py, or --cfg job.
"""

import check_environment  # noqa: F401

from sepllm_train.suite.main import main

if __name__ == "__main__":
    main()
