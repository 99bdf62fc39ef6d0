"""sepllm suite: many runs of one question on the same data in the same order, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from sepllm_train.cli import hydra_line
from sepllm_train.config.folder import config_folder
from sepllm_train.config.present import require_dataset
from sepllm_train.suite.config import SuiteSettings

_HELP = """usage: sepllm suite +suite=NAME [OVERRIDE ...]

Train the variants of a suite on the same data in the same order and report what each costs. The same command typed
again continues.

examples:
  sepllm suite +suite=paper suite.size=cpu 'suite.text=[books.jsonl.bz2]'
  sepllm suite +suite=paper suite.size=gpu suite.prefix=data/books
  sepllm suite +suite=paper suite.prefix=data/books 'suite.only.seeds=[1]' suite.jobs=2
"""


def main(words: Sequence[str]) -> None:
    """Compose the configuration of a suite and run it. Raises UserError."""
    if "-h" in words or "--help" in words:
        print(_HELP)
        print("suites: " + ", ".join(hydra_line.choices("suite")))
        sizes = yaml.safe_load((config_folder() / "suite.yaml").read_text(encoding="utf8"))["sizes"]
        print("sizes (suite.size): " + ", ".join(sizes) + "\n")
        print(
            "Every key with its value: sepllm suite +suite=NAME --cfg job; all documented: sepllm_train/suite/config.py"
        )
        return
    hydra_line.run("suite", words, _run, "suite", "suite_schema", SuiteSettings)


def _run(config: SuiteSettings) -> None:
    """Look for the text, then run the suite."""
    if not config.suite.dry_run and {"train", "time", "evaluate"} & set(config.suite.do):
        if config.suite.text:
            from data_prep.readers import Corpus

            Corpus([Path(text).expanduser() for text in config.suite.text])
        if config.suite.prefix is not None:
            require_dataset(config.suite.prefix)

    from sepllm_train.suite.main import run_suite

    run_suite(config)
