"""Which keys a layer's cache keeps."""

from __future__ import annotations

from dataclasses import dataclass

from sep_attention import FOREVER

# Keys a cache without a capacity may hold beyond those that are still seen: dropping costs a copy of what stays.
SLACK = 256


@dataclass(frozen=True)
class CachePolicy:
    """The four blocks [initial | separators | past window | local window] of one layer's cache.

    Tokens are appended until the cache holds `capacity` keys. Before the next one, keys outside of the local window
    are dropped, all but the `initial` first of the sequence and the newest `separators` of those that are separators.

    Attributes:
        window: newest tokens that always stay, the one being appended included; FOREVER keeps all.
        initial: first tokens of the sequence that always stay.
        separators: separators that stay beyond the window; None = all of them.
        capacity: keys the cache holds at most. None lets it grow and hides from a query what the pattern does not
            show it, so that the result is that of the pattern as a mask.

    Raises ValueError with the numbers when they do not fit together.
    """

    window: int
    initial: int = 0
    separators: int | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("initial", 0), ("separators", 0), ("capacity", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
        if self.capacity is None:
            if self.separators is not None and self.window < FOREVER:
                raise ValueError(
                    f"separators={self.separators} needs a capacity above initial + separators + window = "
                    f"{self.initial + self.separators + self.window}; separators=None keeps all without one."
                )
            return
        if self.separators is None:
            raise ValueError(f"capacity={self.capacity} needs a number of separators to keep, not separators=None.")
        kept = self.initial + self.separators + self.window
        least = kept + (self.separators > 0)
        if self.capacity < least:
            raise ValueError(
                f"initial={self.initial} + separators={self.separators} + window={self.window} is {kept}, and "
                f"capacity={self.capacity} must be larger: at least {least}."
            )

    @property
    def hides(self) -> bool:
        """Whether keys can be in the cache that a query does not see."""
        return self.capacity is None and self.window < FOREVER

    @property
    def mean_length(self) -> float | None:
        """Keys in the cache on average over a long text with enough separators, by the paper's formula
        (a + s + w + c) / 2; None without a capacity."""
        if self.capacity is None or self.separators is None:
            return None
        return (self.initial + self.separators + self.window + self.capacity) / 2
