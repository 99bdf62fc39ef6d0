"""Finds the attention.keep_share at which random thinning sees as many keys per token as a configuration's horizons do.

python scripts/match_keep_share.py +experiment=demo_sep attention=tiers data.sequence_length=8192
python scripts/match_keep_share.py --samples 256 attention=tiers data=prefixes 'data.prefixes=[data/books]'

Takes the overrides of a run with horizons, counts visible keys exactly on its first training samples, and prints the
overrides to add for the run with thinned separators.
"""

from __future__ import annotations

import check_environment  # noqa: F401

from dataclasses import replace
from typing import Any

from tqdm import tqdm

from sepllm_train.base.errors import exit_on_user_error
from sepllm_train.config.load import parse_counting
from sepllm_train.config.schema import AttentionConfig, Config


def main() -> None:
    """Print mean visible keys and the overrides of the thinned run."""
    _match(*parse_counting(__doc__))


def _match(config: Config, count: int) -> None:
    """Count on the first `count` samples of a configuration and print what was found."""
    # Imported late: megatron-core takes seconds, which a typo on the command line should not cost.
    from sepllm_train.analysis.match import matching_keep_share, mean_keys
    from sepllm_train.data.choice import settle_separators
    from sepllm_train.data.corpus import open_corpus
    from sepllm_train.data.splits import build_datasets
    from sepllm_train.distributed.launch import launch_from_environment, reading_group

    corpus = open_corpus(config.data)
    config, _ = settle_separators(config, corpus)
    layers, length = config.model.layers, config.data.sequence_length

    def samples(attention: AttentionConfig) -> Any:
        dataset: Any = build_datasets(replace(config, attention=attention), corpus)[0]
        return (dataset[number] for number in tqdm(range(count), unit="sample", leave=False, disable=None))

    with reading_group(launch_from_environment()):
        found = matching_keep_share(config.attention, layers, samples(config.attention))
        thinned = mean_keys(found.attention, layers, samples(found.attention))
    print(
        f"mean visible keys per token and layer on {count} samples of {length:,} tokens: {found.horizons:.2f} as "
        f"configured, {found.neighbours:.2f} without separators, {found.forever:.2f} with all for ever"
    )
    print(
        f"keep_share {found.share:.6g} is expected to show as many; with the seed of the run it shows {thinned:.2f} "
        f"({thinned / found.horizons - 1:+.2%})"
    )
    names = ",".join(found.attention.separators)
    print(f"attention.placement=thinned attention.keep_share={found.share:.6g} 'attention.separators=[{names}]'")


if __name__ == "__main__":
    exit_on_user_error(main)
