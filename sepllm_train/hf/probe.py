"""Trying out on a few tokens that a model attends as a pattern or a cache of ours wants it to.

Some models take no mask of their own, make more of it than a mask, have layers that see the text in other ways, or keep
something else than keys: none of them reports it, and all are found here.

Shape letters: B rows (sequences), T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sep_attention import FOREVER
from torch import Tensor
from transformers import DynamicCache

from sepllm_train.hf.hooks import cache_argument, decoder_of, give_masks, position_argument, takes_cache, tokens_of

TOKENS, PADDING = 6, 2
# What a model that does not suit may raise.
ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError)
# Differences that are rounding, as a fraction of the largest number, of full and of half precision.
_ROUNDING, _HALF_ROUNDING = 1e-4, 0.1
# Share of a token's influence on later ones that is none.
_INFLUENCE, _HALF_INFLUENCE = 1e-2, 0.25


class _Seen:
    """In the place of a pattern: the first `initial` tokens and the last `window` are seen."""

    def __init__(self, window: int, initial: int = 0) -> None:
        self.window, self.initial = window, initial

    def prepare(self, base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward with the mask."""
        _, valid = tokens_of(kwargs)
        place = valid.cumsum(1) - 1
        number = torch.arange(valid.shape[1], device=valid.device)
        back = number[:, None] - number
        seen = (back < self.window) | (place < self.initial)[:, None]
        mask = ((back >= 0) & seen & valid[:, None]) | (back == 0)
        layers = base.config.get_text_config().num_hidden_layers
        masks = give_masks(base, [mask] * layers, [torch.where(valid, place, -1)] * layers)
        return {**kwargs, "attention_mask": masks} | position_argument(base, place.clamp(min=0))


class ModelTrial:
    """A few tokens, and what a model makes of them as it is.

    Rows: a text, the same with another first token, and its beginning behind padding.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.base = model, decoder_of(model)
        self.name = type(self.base).__name__
        vocabulary = self.base.config.get_text_config().vocab_size
        # Ids of the middle, where no special token is.
        ids = (torch.arange(TOKENS, device=self.base.device) + vocabulary // 2).expand(3, -1) % vocabulary
        ids[1, 0] -= 1
        ids[2, PADDING:] = ids[0, :-PADDING]
        self.ids, self.valid = ids, torch.ones_like(ids)
        self.valid[2, :PADDING] = 0
        half = self.base.dtype.itemsize < 4
        self.rounding, self.influence = (_HALF_ROUNDING, _HALF_INFLUENCE) if half else (_ROUNDING, _INFLUENCE)

    def look(self, pattern: Any = None) -> str | None:
        """Note the outputs of the two rows without padding as the model is; gives the reason why there are none."""
        try:
            self.plain = self._run(pattern, {"input_ids": self.ids[:2]})
        except ERRORS as error:
            return _failed(error)
        return None

    def reason(self, pattern: Callable[[int], Any], *, cached: bool = False) -> str | None:
        """Reason why the model does not attend by a pattern; None when it does.

        pattern: makes that of a window, as the hook before a forward uses it. cached: try transformers' cache too.
        """
        plain = self.plain
        padded = {"input_ids": self.ids, "attention_mask": self.valid}
        try:
            full = self._run(pattern(FOREVER), padded)
            own = self._run(pattern(1), padded)
        except ERRORS as error:
            return _failed(error)
        if self.differ(full[:2], plain):
            return "given a mask that shows all tokens, its output is not that without one"
        left, influence = (float((out[1] - out[0])[1:].abs().max()) for out in (own, plain))
        if left > self.influence * influence + self.rounding * float(plain.abs().max()):
            return "a token that the mask hides still changes the output of later ones"
        if self.differ(full[2, PADDING:], plain[0, :-PADDING]):
            return "padding on the left changes what comes after it"
        if not cached or not takes_cache(self.base):
            return None
        try:
            parts = self._in_two(pattern(FOREVER), padded)
        except ERRORS as error:
            return _failed(error)
        there = self.valid.bool()
        return (
            "with keys in a cache its output is not that without one"
            if self.differ(parts[there], full[there])
            else None
        )

    def cache_reason(self, make: Callable[[Any, int, int], Any]) -> str | None:
        """Reason why the model does not suit our caches; None when it does."""
        # Attention of ours, which a pattern was put on with, has no other way to attend fully.
        ours = self.base.config._attn_implementation in ("sep", "sepllm")
        reason = self.look(_Seen(FOREVER) if ours else None) or self.reason(_Seen)
        if reason is not None:
            return reason
        try:
            biases = self.base.sepllm_layer_masks.biases
            rows = [0] if biases is not None and biases.one_text else [0, 2]
            arguments = {"input_ids": self.ids[rows], "attention_mask": self.valid[rows]}
            known = self._run(_Seen(2, 1), arguments)
            cached = {cache_argument(self.base): make(self.base, 2, 1), "use_cache": True}
            found = self._run(None, arguments | cached)
        except ERRORS as error:
            return _failed(error)
        there = self.valid[rows].bool()
        if self.differ(found[there], known[there]):
            return "keys that are dropped from its cache change its output in another way than keys that a mask hides"
        return None

    def differ(self, found: Tensor, known: Tensor) -> bool:
        """True when outputs differ by more than rounding."""
        return not float((found - known).abs().max()) <= self.rounding * float(known.abs().max())

    def _in_two(self, pattern: Any, arguments: dict[str, Tensor]) -> Tensor:
        """Outputs of a forward that is cut, its keys being kept in transformers' cache."""
        cache = {cache_argument(self.base): DynamicCache(config=self.base.config), "use_cache": True}
        cut = TOKENS - 2
        first = self._run(pattern, {name: tensor[:, :cut] for name, tensor in arguments.items()} | cache)
        rest = self._run(pattern, {**arguments, "input_ids": arguments["input_ids"][:, cut:]} | cache)
        return torch.cat((first, rest), 1)

    @torch.no_grad()
    def _run(self, pattern: Any, arguments: dict[str, Any]) -> Tensor:
        """First output of a forward in evaluation with a pattern put on for it."""
        base, modes = self.base, {module: module.training for module in self.model.modules()}
        before, base.sepllm_pattern = getattr(base, "sepllm_pattern", None), pattern
        try:
            self.model.eval()
            output = self.model(**{"use_cache": False, **arguments})[0]
            return output if output.dtype == torch.float64 else output.float()
        finally:
            for module, training in modes.items():
                module.training = training
            base.sepllm_pattern = before


def _failed(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"a forward of {TOKENS} tokens fails with {type(error).__name__}: {lines[0][:160]}".rstrip(": .")


def check_cache(base: Any, make: Callable[[Any, int, int], Any]) -> None:
    """Try a model out the first time that a cache is made for it. Raises ValueError when it does not suit our caches.

    base: the part of it that has the layers. make: makes a cache of the model that keeps a window and initial tokens.
    """
    shared = base.sepllm_layer_masks
    if shared.tried:
        return
    # The cache of the trial is not tried out itself.
    shared.tried = True
    reason = ModelTrial(base).cache_reason(make)
    if reason is not None:
        shared.tried = False
        raise ValueError(f"{type(base).__name__} does not suit this cache: {reason}.")
