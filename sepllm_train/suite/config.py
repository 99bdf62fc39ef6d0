"""The configuration of a suite: what `configs/suite.yaml` and `configs/suite/NAME.yaml` may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sepllm_train.config.schema import one_of, positive, require

# What the plan gives every run, and the key of the suite that it comes from.
PLANNED = {
    "seed": "suite.seeds",
    "name": "the variant's name",
    "run_root": "suite.root",
    "resume": "the suite, which always continues",
    "data": "suite.prefix or suite.text",
    "data.source": "suite.prefix or suite.text",
    "data.prefixes": "suite.prefix or suite.text",
    "data.sequence_length": "suite.lengths",
    "training.steps": "sizes.SIZE.steps",
    "training.global_batch": "sizes.SIZE.tokens_per_step",
    "training.micro_batch": "sizes.SIZE.micro_batch_tokens",
    "training.validation_samples": "sizes.SIZE.validation_tokens",
}
ACTIONS = ("train", "time", "evaluate", "report")
# What a report draws at each length, as far as there are intervals or a sweep.
FIGURES = ("loss_vs_flops", "loss_vs_seconds", "loss_vs_tokens", "loss_vs_learning_rate", "ratios")


@dataclass
class SizeConfig:
    """Size of the runs of a suite. Tokens are those of all processes together."""

    # Entries of the tokenizer that is trained on suite.text; of no effect with suite.tokenizer or suite.prefix.
    vocabulary: int = 8192
    lengths: list[int] = field(default_factory=lambda: [2048])
    seeds: list[int] = field(default_factory=lambda: [1])
    # Processes of a run.
    processes: int = 1
    tokens_per_step: int = 8192
    # Tokens that a process takes at a time; at least one sequence.
    micro_batch_tokens: int = 2048
    # Steps of the variants, and of the reference, whose last validation loss they are to reach.
    steps: int = 128
    reference_steps: int = 128
    # Tokens of a validation, from the held-out documents.
    validation_tokens: int = 16384
    # Tokens on which the last checkpoints are evaluated.
    evaluation_tokens: int = 65536
    # Rounds that count when the variants' steps are timed in interleaved rounds, and the steps of a round.
    timing_rounds: int = 5
    timing_steps: int = 2
    # The older name of timing_rounds.
    timing_turns: int | None = None
    # What the suite learning_rate trains with: optim.lr of its variants, optim.min_lr being a tenth of it.
    learning_rates: list[float] = field(default_factory=list)
    # Of every run.
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.timing_turns is not None:
            self.timing_rounds = self.timing_turns
        positive(
            "sizes",
            self,
            "vocabulary",
            "processes",
            "tokens_per_step",
            "micro_batch_tokens",
            "steps",
            "reference_steps",
            "validation_tokens",
            "evaluation_tokens",
            "timing_rounds",
            "timing_steps",
        )


@dataclass
class SelectionConfig:
    """The part of the plan that is worked on now; an empty list means all of it."""

    variants: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    # The older name of variants.
    rows: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.variants = self.variants or self.rows


@dataclass
class SuiteConfig:
    """Variants of a suite: a name and the overrides that make the variant, in the order of the report."""

    name: str = ""
    question: str = ""
    reference: str = "dense"
    # Give the reference as many steps as the other variants: for comparisons at equal tokens, not of what it takes to
    # reach its last loss.
    same_steps: bool = False
    variants: dict[str, list[str]] = field(default_factory=dict)
    # The older name of variants.
    rows: dict[str, list[str]] = field(default_factory=dict)
    # Train every variant with each of these learning rates, as NAME_lrRATE; empty: with the size's.
    learning_rates: list[float] = field(default_factory=list)
    size: str = "cpu"
    # In place of the size's.
    lengths: list[int] | None = None
    seeds: list[int] | None = None
    # What the runs read: a prepared dataset; or text, which is tokenised once with `tokenizer`, or with one that is
    # trained on it. Without either, the sample corpus.
    prefix: str | None = None
    text: list[str] = field(default_factory=list)
    unwrap: bool = True
    tokenizer: str | None = None
    # The suite is written to ROOT/NAME-SIZE.
    root: str = "suites"
    # Runs at a time; each gets its share of the cores.
    jobs: int = 1
    only: SelectionConfig = field(default_factory=SelectionConfig)
    do: list[str] = field(default_factory=lambda: list(ACTIONS))
    # Folder for a copy of the figures without checkpoints, to keep or to publish.
    export: str | None = None
    # Figures in that copy, beside those it already has.
    figures: list[str] = field(default_factory=lambda: ["loss_vs_flops", "loss_vs_learning_rate"])
    # Added to every run's, after the size's and before the variant's.
    overrides: list[str] = field(default_factory=list)
    # Say what would be run, and stop.
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.variants = {**self.variants, **self.rows}
        positive("suite", self, "jobs")
        rates = self.learning_rates
        require(all(rate > 0 for rate in rates), f"suite.learning_rates={rates} must be above 0.")
        require(len(set(rates)) == len(rates), f"suite.learning_rates={rates} names one twice.")
        require(
            not rates or self.same_steps, "suite.learning_rates are compared at equal tokens: set suite.same_steps."
        )
        for action in self.do:
            one_of("suite.do", action, ACTIONS)
        for figure in self.figures:
            one_of("suite.figures", figure, FIGURES)
        require(
            self.prefix is None or not (self.text or self.tokenizer),
            f"suite.prefix={self.prefix} is prepared data: it does not go with suite.text or suite.tokenizer.",
        )
        require(
            self.tokenizer is None or bool(self.text),
            f"suite.tokenizer={self.tokenizer} is for suite.text, which is empty.",
        )


@dataclass
class SuiteSettings:
    """All of it: the suite and the sizes to choose from."""

    suite: SuiteConfig = field(default_factory=SuiteConfig)
    sizes: dict[str, SizeConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        suite = self.suite
        require(bool(suite.name) and bool(suite.variants), "no suite is named: add one, such as +suite=paper.")
        for name in (suite.name, *suite.variants):
            require(
                re.fullmatch(r"\w[\w.-]*", name) is not None,
                f"{name!r} is no name for a suite or a variant: letters, digits, _, - and . make folder names.",
            )
        one_of("suite.size", suite.size, tuple(self.sizes))
        require(
            suite.reference in suite.variants,
            f"suite.reference={suite.reference} is not a variant: choose one of {', '.join(suite.variants)}.",
        )
        for key, values in (("lengths", self.lengths), ("seeds", self.seeds)):
            require(bool(values), f"suite.{key} is empty: give at least one.")
            require(len(set(values)) == len(values), f"suite.{key}={values} names one twice.")
            require(min(values) >= 1, f"suite.{key}={values} must be numbers of at least 1.")
            unknown = set(getattr(suite.only, key)) - set(values)
            require(not unknown, f"suite.only.{key} names {sorted(unknown)}; the suite has {values}.")
        for override in (
            *suite.overrides,
            *self.size.overrides,
            *(own for all_ in suite.variants.values() for own in all_),
        ):
            key = override.lstrip("+~").partition("=")[0]
            require(key not in PLANNED, f"{override} is part of the plan: set it by {PLANNED.get(key)}.")
        timed = (self.size.timing_rounds + 1) * self.size.timing_steps
        steps = self.size.steps if suite.same_steps else min(self.size.steps, self.size.reference_steps)
        require(
            timed <= steps,
            f"sizes.{suite.size}: timing_rounds and one to warm up take {timed} steps, and a run has {steps}.",
        )
        strange = [name for name in suite.only.variants if name not in self.variants]
        require(not strange, f"suite.only.variants names {strange}; the suite has {', '.join(self.variants)}.")
        for length in self.lengths:
            require(
                self.size.tokens_per_step % length == 0,
                f"suite.lengths: {length} tokens do not divide the {self.size.tokens_per_step} tokens of a step.",
            )

    @property
    def size(self) -> SizeConfig:
        """The chosen size."""
        return self.sizes[self.suite.size]

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths."""
        return self.size.lengths if self.suite.lengths is None else self.suite.lengths

    @property
    def seeds(self) -> list[int]:
        """Seeds: each is of one model's weights and one order of the data, the same for every variant."""
        return self.size.seeds if self.suite.seeds is None else self.suite.seeds

    @property
    def variants(self) -> dict[str, list[str]]:
        """Overrides of every variant by name; with learning rates, of each variant at each of them."""
        suite = self.suite
        if not suite.learning_rates:
            return suite.variants
        return {
            _at_rate(name, rate): [*own, f"optim.lr={rate:g}", f"optim.min_lr={rate / 10:g}"]
            for name, own in suite.variants.items()
            for rate in suite.learning_rates
        }

    @property
    def reference(self) -> str:
        """The variant that the others are compared with; with learning rates, at the middle one."""
        rates, name = self.suite.learning_rates, self.suite.reference
        return _at_rate(name, rates[len(rates) // 2]) if rates else name


def _at_rate(name: str, rate: float) -> str:
    return f"{name}_lr{rate:g}"
