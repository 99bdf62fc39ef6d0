"""Finds the attention.interval at which every so many tokens keep as many keys as a configuration's separators do.

python scripts/match_interval.py attention=sep data=prefixes 'data.prefixes=[data/books]'
python scripts/match_interval.py --samples 256 +experiment=demo_sep 'attention.separators=[period,question]'

Takes the overrides of a run with separators, counts exactly on its first training samples the keys that the last token
of a sequence sees, over all keys up to it, and prints the overrides to add for the run with a fixed interval, and for
one that has neighbours alone.
"""

from __future__ import annotations

import check_environment  # noqa: F401

from dataclasses import replace
from typing import Any

from tqdm import tqdm

from sepllm_train.base.errors import exit_on_user_error
from sepllm_train.config.load import parse_counting
from sepllm_train.config.schema import Config


def main() -> None:
    """Print the shares of keys kept and the overrides of the runs that match."""
    _match(*parse_counting(__doc__))


def _match(config: Config, count: int) -> None:
    """Count on the first `count` samples of a configuration and print what was found."""
    # Imported late: megatron-core takes seconds, which a typo on the command line should not cost.
    import torch

    from sepllm_train.analysis.match import kept_keys, matching_interval, matching_window
    from sepllm_train.data.choice import settle_separators
    from sepllm_train.data.corpus import open_corpus
    from sepllm_train.data.splits import build_datasets
    from sepllm_train.distributed.launch import launch_from_environment, reading_group
    from sepllm_train.model.pattern import resolve_pattern

    corpus = open_corpus(config.data)
    config, _ = settle_separators(config, corpus)
    layers, length = config.model.layers, config.data.sequence_length
    resolve_pattern(config.attention, layers)
    with reading_group(launch_from_environment()):
        dataset: Any = build_datasets(config, corpus)[0]
        samples = [dataset[number] for number in tqdm(range(count), unit="sample", leave=False, disable=None)]
    text = {key: torch.stack([sample[key] for sample in samples]) for key in ("separator_class", "document_start")}
    interval = matching_interval(config.attention, layers, text)
    window = matching_window(config.attention, layers, text)

    def kept(**changes: Any) -> str:
        return f"{kept_keys(resolve_pattern(replace(interval.attention, **changes), layers), text).last:.2%}"

    around = ", ".join(f"{d} {kept(interval=d)}" for d in (interval.value - 1, interval.value + 1) if d >= 1)
    print(
        f"keys kept at the last token of {count} samples of {length:,} tokens: {interval.wanted:.2%} with separators, "
        f"{kept(pattern='streaming')} without"
    )
    print(f"interval {interval.value} keeps {interval.kept:.2%} ({around}); window {window.value} {window.kept:.2%}")
    print(f"attention=fixed attention.interval={interval.value}")
    print(f"attention=streaming attention.window={window.value}")


if __name__ == "__main__":
    exit_on_user_error(main)
