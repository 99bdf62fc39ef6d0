"""Scaling of rotary positions for contexts longer than those of training: the group `model.rotary_scaling`.

Names, numbers and formulas are those of transformers' `rope_parameters`. Needs no torch.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass
from typing import Any

from sepllm_train.config.keys import at_most, finite, positive, require, setting

# Numbers of each type: those that it needs, and those that it may have besides.
_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "ntk": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}
# Two numbers of a type of which the first is smaller, and transformers' values of those that may be left out.
_BOUNDS = {"yarn": ("beta_slow", "beta_fast"), "llama3": ("low_freq_factor", "high_freq_factor")}
_DEFAULTS = {"beta_slow": 1.0, "beta_fast": 32.0}
_KEY = "model.rotary_scaling"


@dataclass
class RotaryScalingConfig:
    """Scaling of the rotary frequencies; None throughout = none. Lengths are counts of tokens."""

    rope_type: str | None = setting(
        None,
        "linear (positions divided by factor) | ntk (a larger base) | yarn | llama3; None or default = no scaling.",
    )
    factor: float | None = setting(None, "How many times longer the context is made.")
    original_max_position_embeddings: int | None = setting(
        None, "yarn, llama3: sequence length of the training before."
    )
    low_freq_factor: float | None = setting(
        None, "llama3: wavelengths above original_max_position_embeddings / this are stretched by factor."
    )
    high_freq_factor: float | None = setting(
        None, "llama3: wavelengths below original_max_position_embeddings / this stay."
    )
    beta_fast: float | None = setting(
        None, "yarn: frequencies of more rotations over the original length stay; None = 32."
    )
    beta_slow: float | None = setting(
        None, "yarn: frequencies of fewer rotations over the original length are divided by factor; None = 1."
    )
    attention_factor: float | None = setting(
        None, "yarn: multiplies cosines and sines; None = 0.1 ln(factor) + 1, or by mscale."
    )
    mscale: float | None = setting(
        None,
        "yarn, with mscale_all_dim: attention_factor = (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) "
        "+ 1).",
    )
    mscale_all_dim: float | None = setting(None, "yarn: see mscale.")
    truncate: bool | None = setting(
        None, "yarn: round the first and last feature that is partly scaled outwards; None = true."
    )

    def __post_init__(self) -> None:
        if self.rope_type == "default":
            self.rope_type = None
        finite(_KEY, self)
        self._check_type()
        positive(_KEY, self, "factor", "original_max_position_embeddings")
        at_most(_KEY, self, original_max_position_embeddings=2**30)
        for name, value in self.record().items():
            # Numbers beyond overflow in the formulas.
            require(
                not isinstance(value, float) or 1e-6 <= value <= 1e6,
                f"{_KEY}.{name}={value} must lie between 1e-6 and 1e6.",
            )
        if self.rope_type in _BOUNDS:
            (low, below), (high, above) = zip(_BOUNDS[self.rope_type], self._bounds, strict=True)
            require(below < above, f"{_KEY}.{high}={above:g} must be above {_KEY}.{low}={below:g}.")
        pair = (self.mscale is None, self.mscale_all_dim is None)
        require(pair[0] == pair[1], f"{_KEY}.mscale and {_KEY}.mscale_all_dim are given together, or neither of them.")
        require(
            pair[0] or self.attention_factor is None,
            f"{_KEY}.attention_factor={self.attention_factor} is what mscale would decide: give one of them.",
        )

    def _check_type(self) -> None:
        """The type is known, and has the numbers that are given."""
        kind, known = self.rope_type, list(_NUMBERS)
        near = difflib.get_close_matches(str(kind), known, n=1)
        require(
            kind != "dynamic",
            f"{_KEY}.rope_type=dynamic has other frequencies for each length of text, which training has not: take "
            "ntk, the same formula for one length.",
        )
        require(
            kind is None or kind in known,
            f"{_KEY}.rope_type={kind} is unknown{f' (did you mean {near[0]}?)' if near else ''}: choose one of "
            f"{', '.join(known)}, or default for none.",
        )
        needed, besides = _NUMBERS[kind] if kind else ((), ())
        given = self.record()
        given.pop("rope_type", None)
        for name in given:
            of = " and ".join(one for one, numbers in _NUMBERS.items() if name in (*numbers[0], *numbers[1]))
            require(
                name in (*needed, *besides), f"{_KEY}.{name}={given[name]} is of {_KEY}.rope_type {of}, not of {kind}."
            )
        missing = [name for name in needed if name not in given]
        require(not missing, f"{_KEY}.rope_type={kind} needs {' and '.join(f'{_KEY}.{name}' for name in missing)}.")

    @property
    def _bounds(self) -> tuple[float, float]:
        """The two numbers of _BOUNDS."""
        assert self.rope_type is not None
        low, high = ({**_DEFAULTS, **self.record()}[name] for name in _BOUNDS[self.rope_type])
        return low, high

    def record(self) -> dict[str, Any]:
        """The values that are set, by key; empty without a scaling."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def base(self, base: int, features: int) -> float:
        """Base of the wavelengths: with `ntk`, base x factor^(R / (R - 2)) for R rotary features, which stretches the
        longest wavelength by `factor` and leaves the shortest (NTK-aware scaling, bloc97 2023)."""
        if self.rope_type != "ntk":
            return base
        assert self.factor is not None
        return float(base * self.factor ** (features / (features - 2)))

    def ramp(self, base: int, features: int) -> tuple[float, float]:
        """`yarn`: pairs of features up to the first number, counted from the fastest, keep their frequency, those from
        the second on are divided by factor (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""
        length = self.original_max_position_embeddings
        assert length is not None
        slow, fast = self._bounds
        # The pair of features that makes so many rotations over the original length.
        first, last = (
            features * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base)) for rotations in (fast, slow)
        )
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        return max(first, 0), min(last, features - 1)

    @property
    def attention_scaling(self) -> float:
        """Factor of cosines and sines, so its square is that of scores; 1 but for `yarn`."""
        if self.rope_type != "yarn":
            return 1.0
        assert self.factor is not None
        if self.attention_factor is not None:
            return self.attention_factor
        growth = 0.1 * math.log(self.factor)
        if self.mscale is None or self.mscale_all_dim is None:
            return growth + 1
        return (growth * self.mscale + 1) / (growth * self.mscale_all_dim + 1)


def in_words(record: dict[str, Any] | None) -> str:
    """`RotaryScalingConfig.record`, also one from a file, as words: `yarn, factor 8`; `none` without a scaling."""
    given = dict(record or {})
    kind = str(given.pop("rope_type", "none"))
    numbers = (f"{key} {f'{value:g}' if isinstance(value, float) else value}" for key, value in given.items())
    return ", ".join((kind, *numbers))
