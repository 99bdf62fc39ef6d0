"""sepllm match: baselines that keep as many keys as a configuration with separators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sepllm_train.cli import flags
from sepllm_train.config.present import require_data
from sepllm_train.config.schema import AttentionConfig, Config

_COUNTED = "Counts are exact, on the first training samples of the configuration. Prints the overrides to add"


def main(words: Sequence[str]) -> None:
    """Run a sub-command. Raises UserError."""
    parser = flags.parser("match", "Find baselines that keep as many keys as a configuration with separators.")
    commands = flags.subcommands(parser)
    summary = f"the attention.keep_share at which random thinning sees as many keys as horizons do.\n{_COUNTED}."
    example = "--samples 256 attention=tiers data=prefixes 'data.prefixes=[data/books]'"
    _add_overrides(flags.subcommand(commands, "keep-share", summary, _keep_share, example))
    summary = "the attention.interval at which every so many tokens keep as many keys as separators do.\n" + (
        f"{_COUNTED} for a fixed interval, and for a window alone."
    )
    example = "--samples 256 +experiment=demo_sep 'attention.separators=[period,question]'"
    _add_overrides(flags.subcommand(commands, "interval", summary, _interval, example))
    arguments = parser.parse_args(words)
    flags.at_least(arguments, 1, "samples")

    from sepllm_train.config.load import configuration_of

    config = configuration_of(arguments.overrides)
    require_data(config)
    arguments.run(config, arguments.samples)


def _add_overrides(command: flags.Parser) -> None:
    command.add_argument("--samples", type=int, default=64, metavar="N", help="training samples counted (%(default)s)")
    command.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for `sepllm pretrain`")


def _keep_share(config: Config, count: int) -> None:
    """Count on the first `count` samples of a configuration and print what was found."""
    from tqdm import tqdm

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


def _interval(config: Config, count: int) -> None:
    """Count on the first `count` samples of a configuration and print what was found."""
    import torch
    from tqdm import tqdm

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
