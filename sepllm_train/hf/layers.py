"""Keys and values of one layer of a cache.

Shape letters: B rows (sequences), W columns (keys, padding on the left), N new tokens, H key heads, D features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values [B, H, W, D] in buffers with room for tokens to come.

    cache: a SlotCache, which tells how many tokens come and how keys move. capacity: the columns there will be at most,
    None when there is no end.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, cache: Any, capacity: int | None) -> None:
        super().__init__()
        self._cache = cache
        self._capacity = capacity
        self._width = 0
        # Keys as they arrived, where they move: rotated anew from these, they do not collect rounding errors.
        self._arrived: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty buffers of the shape of what comes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        room = self._capacity or 2 * key_states.shape[-2]
        self.keys, self.values = _buffer(key_states, room, 0), _buffer(value_states, room, 0)
        self._arrived = _buffer(key_states, room, 0) if self._cache.moves else None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, N, D]; gives all of them, [B, H, W, D].

        Raises RuntimeError when the model has not told the cache which tokens these are of.
        """
        new = key_states.shape[-2]
        if self._cache.pending != new:
            raise RuntimeError(
                "the cache was not told which tokens these keys are of: it was made for another model than it is given "
                "to, or that model's hooks were removed."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._width + new
        if end > self.keys.shape[2]:
            room = max(end, self.keys.shape[2] * 3 // 2)
            self._make_room(room)
        self.keys[:, :, self._width : end] = key_states
        self.values[:, :, self._width : end] = value_states
        if self._arrived is not None:
            self._arrived[:, :, self._width : end] = key_states
        self._width = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def drop(self, order: Tensor, distance: Tensor | None) -> None:
        """Keep the columns `order`, i64 [B, W']; keys move by `distance`, i64 [B, W'], from where they arrived.

        The buffers are new ones, so that an older state of the cache still has its own.
        """
        if not self.is_initialized:
            return
        room, width = self.keys.shape[2], order.shape[1]
        values = _columns(self.values, order)
        if self._arrived is None:
            keys, arrived = _columns(self.keys, order), None
        else:
            assert distance is not None
            arrived = _columns(self._arrived, order)
            keys = self._cache.rotation(arrived, distance)
        self._width = width
        self.keys, self.values, self._arrived = keys, values, arrived
        self._make_room(room)

    def select(self, rows: Tensor) -> None:
        """Keep the rows numbered `rows`, i64 [B']."""
        if self.is_initialized:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self._arrived = None if self._arrived is None else self._arrived.index_select(0, rows)

    def take_back(self, columns: int) -> None:
        """Forget the last columns."""
        self._width -= columns

    def state(self) -> tuple[Any, ...]:
        """What `restore` takes: columns that are there now are not written again once keys are dropped."""
        return self.is_initialized, self._width, self.keys, self.values, self._arrived

    def restore(self, state: tuple[Any, ...]) -> None:
        """Back to an older state."""
        self.is_initialized, self._width, self.keys, self.values, self._arrived = state

    def tensors(self) -> dict[str, Tensor]:
        """What the layer holds, without the room to come."""
        held = {"keys": self.keys, "values": self.values, "arrived": self._arrived} if self.is_initialized else {}
        return {name: tensor[:, :, : self._width] for name, tensor in held.items() if tensor is not None}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `tensors` gave."""
        if tensors:
            self.lazy_initialization(tensors["keys"], tensors["values"])
            self._width = tensors["keys"].shape[2]
            self.keys, self.values, self._arrived = tensors["keys"], tensors["values"], tensors.get("arrived")
            self._make_room(max(self._capacity or 0, self._width))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(held.nbytes for held in (self.keys, self.values, self._arrived) if held is not None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that `query_length` new tokens see, and the number of the first."""
        return self._width + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: generate cuts the prompt by it."""
        return self._cache.columns_seen

    def get_max_length(self) -> int:
        """No maximum: keys make room by themselves."""
        return -1

    # Its name before transformers 5.15.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.restore((False, 0, None, None, None))

    def crop(self, tokens_to_remove: int) -> None:
        """Layers are cropped together, by the cache."""
        raise RuntimeError("crop the cache, not one of its layers.")

    def _make_room(self, room: int) -> None:
        held = (self.keys, self.values, self._arrived)
        self.keys, self.values, self._arrived = (_wider(one, room, self._width) for one in held)


def _buffer(like: Tensor, room: int, used: int) -> Tensor:
    """`room` columns, the first `used` of them those of `like` [B, H, *, D]."""
    wide = like.new_empty(like.shape[0], like.shape[1], room, like.shape[3])
    wide[:, :, :used] = like[:, :, :used]
    return wide


def _wider(held: Any, room: int, used: int) -> Any:
    """A buffer of `room` columns that begins with the first `used` of `held`; None for None."""
    return None if held is None else _buffer(held, room, used)


def _columns(held: Tensor, order: Tensor) -> Tensor:
    """Columns `order`, i64 [B, W'], of [B, H, *, D]."""
    return held.gather(2, order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]))
