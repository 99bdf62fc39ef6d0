"""Policy of a layer's cache, and the bookkeeping of its columns without the keys themselves.

Shape letters: B rows (sequences), W columns, N appended tokens. Rows are right-aligned: the keys of row b are its last
`length[b]` columns, oldest first, and what is before them is padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sep_attention import FOREVER
from torch import Tensor

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
        """True when the cache can hold keys that a query does not see."""
        return self.capacity is None and self.window < FOREVER

    @property
    def mean_length(self) -> float | None:
        """Keys in the cache on average over a long text with enough separators, by the paper's formula
        (a + s + w + c) / 2; None without a capacity."""
        if self.capacity is None or self.separators is None:
            return None
        return (self.initial + self.separators + self.window + self.capacity) / 2


@dataclass(frozen=True, eq=False)
class Slots:
    """Columns of one policy's caches, never changed in place, so an older state is a reference.

    Attributes:
        length: i64 [B], keys of each row.
        limit: i64 [B], length at which a row drops keys before the next token.
        seen: i64 [B], tokens each row has seen; the next one's position in the sequence.
        position: i64 [B, W], position of each key's token in its row; -1 in padding.
        reach: i64 [B, W], distance in tokens up to which the key counts as a separator; 0 for ordinary ones.
    """

    policy: CachePolicy
    length: Tensor
    limit: Tensor
    seen: Tensor
    position: Tensor
    reach: Tensor

    @classmethod
    def empty(cls, policy: CachePolicy, rows: int, device: torch.device) -> Slots:
        """Slots of `rows` sequences that have not begun."""
        none = torch.zeros(rows, dtype=torch.int64, device=device)
        limit = policy.capacity or (FOREVER if policy.window >= FOREVER else policy.initial + policy.window + SLACK)
        return cls(policy, none, none + limit, none, none.new_zeros(rows, 0), none.new_zeros(rows, 0))

    @property
    def width(self) -> int:
        """W, the columns: as many as the longest row has keys."""
        return self.position.shape[1]

    def columns(self) -> Tensor:
        """i64 [B, W]: number of each key within its row's keys, its position inside the cache; below 0 in padding."""
        return torch.arange(self.width, device=self.length.device) - (self.width - self.length)[:, None]

    def append(self, reach: Tensor, valid: Tensor) -> Slots:
        """The slots with N more tokens.

        reach: i64 [B, N]. valid: bool [B, N], False for padding before a row's first token.
        """
        count = valid.cumsum(1)
        position = torch.where(valid, self.seen[:, None] + count - 1, -1)
        return replace(
            self,
            length=self.length + count[:, -1],
            seen=self.seen + count[:, -1],
            position=torch.cat((self.position, position), 1),
            reach=torch.cat((self.reach, torch.where(valid, reach, 0)), 1),
        )

    def full(self) -> Tensor:
        """bool [B]: rows that drop keys before their next token."""
        return self.length >= self.limit

    def drop(self) -> tuple[Slots, Tensor]:
        """The slots after full rows have dropped keys, and i64 [B, W'], the column each of their columns was."""
        policy, full = self.policy, self.full()[:, None]
        valid = self.position >= 0
        distance = self.seen[:, None] - self.position  # to the next token
        always = (self.position < policy.initial) | (distance < policy.window)
        separator = valid & ~always & (self.reach > distance)
        if policy.separators is not None:
            newer = separator.flip(1).cumsum(1).flip(1)  # itself included
            separator = separator & (newer <= policy.separators)
        keep = valid & (always | separator | ~full)
        length = keep.sum(1)
        width = int(length.max())
        # Stable: what goes comes first, what stays keeps its order.
        order = torch.argsort(keep, dim=1, stable=True)[:, self.width - width :]
        position = torch.where(keep.gather(1, order), self.position.gather(1, order), -1)
        return (
            replace(
                self,
                length=length,
                limit=self.limit
                if policy.capacity is not None
                else torch.where(full[:, 0], length + SLACK, self.limit),
                position=position,
                reach=torch.where(position >= 0, self.reach.gather(1, order), 0),
            ),
            order,
        )

    def visible(self, queries: int) -> Tensor:
        """bool [B, N, W]: keys that each of the last `queries` columns sees. A padding column sees itself: a softmax
        over nothing would be NaN."""
        if queries == 1 and not self.policy.hides:
            seen = self.position >= 0
            seen[:, -1] = True
            return seen[:, None]
        key = torch.arange(self.width, device=self.length.device)
        query = key[self.width - queries :, None]
        seen = (key <= query) & (self.position >= 0)[:, None]
        if self.policy.hides:
            at = self.position[:, self.width - queries :, None]
            distance = at - self.position[:, None]
            reach = self.reach.clamp(min=self.policy.window)[:, None]
            seen = seen & ((distance < reach) | (self.position < self.policy.initial)[:, None])
        return seen | (key == query)

    def select(self, rows: Tensor) -> Slots:
        """Slots of the rows numbered `rows`, i64 [B']."""
        names = ("length", "limit", "seen", "position", "reach")
        return replace(self, **{name: getattr(self, name).index_select(0, rows) for name in names})

    def begun_anew(self, rows: Tensor) -> Slots:
        """The slots with the rows that are True in `rows`, bool [B], as before their first token, all padding."""
        return replace(
            self,
            length=torch.where(rows, 0, self.length),
            seen=torch.where(rows, 0, self.seen),
            position=torch.where(rows[:, None], -1, self.position),
            reach=torch.where(rows[:, None], 0, self.reach),
        )

    def without_last(self, columns: int) -> Slots:
        """The slots without the last `columns` columns, which must have been appended since keys were dropped last."""
        gone = (self.position[:, self.width - columns :] >= 0).sum(1)
        keep = self.width - columns
        return replace(
            self,
            length=self.length - gone,
            seen=self.seen - gone,
            position=self.position[:, :keep],
            reach=self.reach[:, :keep],
        )
