"""Separator classes against the data: attention.separators=auto, and classes that old side-cars count as one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from data_prep.density import TOLERANCE, class_names, densities, missing_splits, select
from data_prep.sidecar import check_known
from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import Corpus
from sepllm_train.model.pattern import AUTO, tiers_of_classes


@dataclass(frozen=True)
class ClassChoice:
    """Classes that separators=auto has chosen: `density` is the fraction of the tokens that the classes `names` have,
    `budget` the allowed range, `left_out` the classes that occur and were not taken, each with its fraction."""

    names: list[str]
    density: float
    budget: tuple[float, float]
    left_out: dict[str, float]

    def __str__(self) -> str:
        least, most = self.budget
        left_out = ", ".join(f"{name} {share:.2%}" for name, share in self.left_out.items())
        line = (
            f"separators: auto took {', '.join(self.names)} | {self.density:.1%} of the tokens, budget {least:.1%} to "
            f"{most:.1%} | left out: {left_out or 'none'}"
        )
        if self.density < least - TOLERANCE:
            line += f" | warning: the separator classes of this data cannot reach {least:.1%}"
        return line

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {"density": self.density, "budget": list(self.budget), "left_out": self.left_out}


def settle_separators(config: Config, corpus: Corpus) -> tuple[Config, ClassChoice | None]:
    """The configuration with class names in place of separators=auto, and how they were chosen (None without auto).

    Depends on the headers of the data and its weights alone. Raises UserError when no class is within the budget, and
    when the configuration separates classes that a side-car of the data does not.
    """
    headers = [source.header for source in corpus.sources]
    if config.attention.pattern != "sep" or config.attention.separators != AUTO:
        check_side_cars(config, corpus)
        return config, None
    shares = densities(headers, corpus.weights())
    least, most = config.attention.density_budget
    selection = select(shares, least, most)
    if not any(shares.values()):
        raise UserError(
            "attention.separators=auto: the data has no separators, no token of it has a class: train it with "
            "attention=dense, or prepare text that has some."
        )
    if not selection.numbers:
        rarest = min(share for share in shares.values() if share > 0)
        raise UserError(
            f"attention.separators=auto: no separator class of the data has at most {most:.1%} of its tokens (the "
            f"rarest has {rarest:.1%}): raise attention.density_budget={config.attention.density_budget}, or name "
            "classes in attention.separators."
        )
    split = missing_splits(headers)
    left = {n: share for n, share in shares.items() if share > 0 and n not in selection.numbers}
    choice = ClassChoice(
        names=class_names(selection.numbers, split),
        density=selection.density,
        budget=(least, most),
        left_out={name: left[n] for n in sorted(left) for name in class_names([n], split)},
    )
    config = replace(config, attention=replace(config.attention, separators=choice.names))
    check_side_cars(config, corpus)
    return config, choice


def check_side_cars(config: Config, corpus: Corpus) -> None:
    """Raise UserError when classes get different tiers that a side-car does not tell apart, or does not know."""
    _, tier = tiers_of_classes(config.attention)
    for source in (*corpus.sources, *corpus.validation):
        check_known(source.prefix, source.header, tier.tolist(), "attention.separators")
