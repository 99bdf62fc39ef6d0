"""The tensors of a key-value cache of fixed size, and that they fit together.

Shape letters: L layers, B rows (sequences), H query heads, G key-value heads (H a multiple of G), C slots, D features
of a head of which the first R are rotary, feature i being turned together with feature i + R / 2; P parts of a row
that are attended to apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Up to so many slots one program attends to a whole row of a head; longer ones are cut into parts, for parallelism.
WHOLE_UP_TO = 512
PART = 128


@dataclass(frozen=True, eq=False)
class DecodeCache:
    """Keys, values and what is known of them; made by `allocate`, changed in place by `advance` and `write`.

    A row's keys fill its first `length` slots; what the others hold means nothing. A row starts anew when its `length`
    and `seen` are set to 0.

    Attributes:
        keys: [L, B, G, C, D], the keys that are attended to: rotated to the slot they are in, or as they came.
        values: [L, B, G, C, D].
        arrived: [L, B, G, C, D], keys as they came, from which a moved key is made anew by one rotation, so that
            errors do not add up from move to move; None when keys keep the position they were given.
        length: i32 [B], keys of each row.
        seen: i64 [B], tokens each row has seen; the next one's position in the row.
        reach: i32 [B, C], distance in tokens below which a slot's key counts as a separator; 0 for ordinary ones,
            FOREVER without end.
        position: i64 [B, C], position in the row of each slot's token.
        arrival: i32 [B, C], slot in which each slot's key arrived.
        source: i32 [B, C], scratch: slot from which the last compaction filled each slot.
        moved: i32 [B], scratch: keys that the step's compaction kept, 0 in rows that were not compacted.
        turn_cos, turn_sin: f32 [C, R / 2], cosine and sine of a turn by 0 .. C-1 positions; None without `arrived`.
        partial: f32 [B, H, P, D], scratch: attention to each part of a row.
        partial_lse: f32 [B, H, P], scratch: binary logarithms of the parts' softmax denominators.
        initial: first tokens of a row that always stay.
        separators: separators beyond the window that stay, the newest.
        window: newest tokens that always stay, the one being appended included.

    Raises ValueError, with the numbers, for what does not fit together.
    """

    keys: Tensor
    values: Tensor
    arrived: Tensor | None
    length: Tensor
    seen: Tensor
    reach: Tensor
    position: Tensor
    arrival: Tensor
    source: Tensor
    moved: Tensor
    turn_cos: Tensor | None
    turn_sin: Tensor | None
    partial: Tensor
    partial_lse: Tensor
    initial: int
    separators: int
    window: int

    def __post_init__(self) -> None:
        if self.keys.dim() != 5 or self.keys.dtype not in DTYPES:
            raise ValueError(
                "keys must be [layers, rows, key-value heads, slots, features] of bfloat16, float16 or float32, got "
                f"{list(self.keys.shape)} of {self.keys.dtype}"
            )
        _check_sizes(self.capacity, self.initial, self.separators, self.window)
        self._check_tensors()

    @classmethod
    def allocate(
        cls,
        layers: int,
        batch: int,
        heads: int,
        kv_heads: int,
        capacity: int,
        head_size: int,
        *,
        initial: int,
        separators: int,
        window: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        inverse_frequencies: Tensor | None = None,
    ) -> DecodeCache:
        """An empty cache of L, B, H, G, C and D.

        Args:
            inverse_frequencies: f32 [R / 2], radians by which one position turns each pair of rotary features:
                positions are those inside the cache and keys are rotated as they move. None: keys keep the position
                they were given.

        The keys and values take 2 (with rotation 3) * L * B * G * C * D elements of `dtype`. Raises ValueError, with
        the numbers, for what does not fit together.
        """
        _check_sizes(capacity, initial, separators, window)
        for name, size in (("layers", layers), ("batch", batch), ("kv_heads", kv_heads), ("head_size", head_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")

        def zeros(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        stored = layers, batch, kv_heads, capacity, head_size
        arrived = turns = None
        if inverse_frequencies is not None:
            if inverse_frequencies.dim() != 1:
                raise ValueError(f"inverse_frequencies must be [R / 2], got {list(inverse_frequencies.shape)}")
            arrived = zeros(*stored, of=dtype)
            # In float64: of large angles float32 would lose digits.
            turns = torch.arange(capacity, device=device)[:, None] * inverse_frequencies.to(device, torch.float64)
        parts = parts_of(capacity)
        return cls(
            keys=zeros(*stored, of=dtype),
            values=zeros(*stored, of=dtype),
            arrived=arrived,
            length=zeros(batch),
            seen=zeros(batch, of=torch.int64),
            reach=zeros(batch, capacity),
            position=zeros(batch, capacity, of=torch.int64),
            arrival=zeros(batch, capacity),
            source=zeros(batch, capacity),
            moved=zeros(batch),
            turn_cos=None if turns is None else turns.cos().float(),
            turn_sin=None if turns is None else turns.sin().float(),
            partial=zeros(batch, heads, parts, head_size, of=torch.float32),
            partial_lse=zeros(batch, heads, parts, of=torch.float32),
            initial=initial,
            separators=separators,
            window=window,
        )

    @property
    def capacity(self) -> int:
        """C, the slots of a row."""
        return self.keys.shape[3]

    @property
    def heads(self) -> int:
        """H, the query heads."""
        return self.partial.shape[1]

    def check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises ValueError for a tensor of another shape or type, on another device, or of a strided last axis."""
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}")
        if tensor.device != self.keys.device:
            raise ValueError(f"{name} is on {tensor.device} but the cache is on {self.keys.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"the last axis of {name} must be contiguous, its stride is {tensor.stride(-1)}, not 1")

    def _check_tensors(self) -> None:
        _, batch, kv_heads, slots, width = self.keys.shape
        if self.partial.dim() != 4 or self.heads < 1 or self.heads % kv_heads:
            raise ValueError(
                f"partial is {list(self.partial.shape)}: its second axis, the query heads, must be a multiple of the "
                f"{kv_heads} key-value heads"
            )
        if len({self.arrived is None, self.turn_cos is None, self.turn_sin is None}) > 1:
            raise ValueError("arrived, turn_cos and turn_sin belong together: give all of them or none")
        half = 0 if self.turn_cos is None else self.turn_cos.shape[-1]
        if 2 * half > width:
            raise ValueError(f"{2 * half} rotary features are more than the {width} of a head")
        i32, i64, f32, parts = torch.int32, torch.int64, torch.float32, parts_of(slots)
        for names, shape, dtype in (
            (("keys", "values", "arrived"), tuple(self.keys.shape), self.keys.dtype),
            (("length", "moved"), (batch,), i32),
            (("seen",), (batch,), i64),
            (("reach", "arrival", "source"), (batch, slots), i32),
            (("position",), (batch, slots), i64),
            (("turn_cos", "turn_sin"), (slots, half), f32),
            (("partial",), (batch, self.heads, parts, width), f32),
            (("partial_lse",), (batch, self.heads, parts), f32),
        ):
            for name in names:
                tensor = getattr(self, name)
                if tensor is None:
                    continue
                self.check(name, tensor, shape, dtype)
                if not tensor.is_contiguous():
                    raise ValueError(f"{name} must be contiguous, its strides are {list(tensor.stride())}")


def parts_of(capacity: int) -> int:
    """P, the parts into which a row of `capacity` slots is cut: by them alone, so that no row depends on the others."""
    return 1 if capacity <= WHOLE_UP_TO else -(-capacity // PART)


def _check_sizes(capacity: int, initial: int, separators: int, window: int) -> None:
    if initial < 0 or separators < 0 or window < 1:
        raise ValueError(
            f"initial={initial} and separators={separators} must be at least 0 and window={window} at least 1"
        )
    if initial + separators + window >= capacity:
        raise ValueError(
            f"{capacity} slots are too few for initial={initial} + separators={separators} + window={window}: they "
            f"must be more than {initial + separators + window}"
        )
