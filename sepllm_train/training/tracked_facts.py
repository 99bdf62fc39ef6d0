"""What a tracker is told about a run: its configuration, and what followed from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import Corpus
from sepllm_train.training.report import Facts
from sepllm_train.training.run_folder import read_environment


def run_facts(config: Config, run: dict[str, Any], folder: Path, corpus: Corpus, facts: Facts) -> dict[str, Any]:
    """The whole configuration under its own keys; beside it `run` (run.json), `environment` (environment.json of the
    run's folder, with the git state), `derived` numbers and `datasets`."""
    return {
        **asdict(config),
        "run": run,
        "environment": read_environment(folder),
        "derived": {
            "parameters": facts.parameters,
            "padded_vocabulary": facts.padded_vocabulary,
            "replicas": facts.replicas,
            "tokens_per_step": facts.tokens_per_step,
            "flops_per_token": facts.flops_per_token,
            "attended_share": facts.attended_share,
            "backends": facts.backends,
            "memory_bytes": facts.memory,
        },
        "datasets": datasets(corpus),
    }


def datasets(corpus: Corpus) -> dict[str, Any]:
    """By name, the header of each dataset of the blend without its tables of vocabulary entries."""
    return {
        source.name: {
            "prefix": source.prefix,
            "weight": weight,
            "tokens": source.header.tokens,
            "documents": source.header.documents,
            "bytes": source.header.bytes,
            "tokenizer": asdict(source.header.tokenizer),
            "files": {f"{source.name}{suffix}": asdict(file) for suffix, file in source.header.files.items()},
            "separator_density": {entry.name: entry.density for entry in source.header.classes},
            "separator_count": {entry.name: entry.count for entry in source.header.classes},
        }
        for source, weight in zip(corpus.sources, corpus.weights(), strict=True)
    }
