"""Check that a model of transformers computes what a checkpoint of ours does: logits on the same tokens, in fp32.

Shape letters: S tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sep_attention import visible_mask
from torch import Tensor

from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import AttentionConfig, Config, ParallelConfig
from sepllm_train.distributed.launch import ALONE, alone, device_of
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern
from sepllm_train.runs.evaluate import attending
from sepllm_train.training import checkpoint as checkpoints

# Largest difference of two logits: absolute, and as a share of the largest logit where that is more.
TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5
# Name of the difference of a model that attends by the pattern by itself.
STANDALONE = "stand-alone"
# Tokens compared: so many that windows end, within these bounds and the model's context.
_LEAST, _MOST = 256, 2048


@dataclass(frozen=True)
class Sides:
    """The two models to compare.

    `checkpoint` is ours, of a model of `config` with `vocabulary` entries, of the separator classes `classes`, u8 [V]
    (all 0 where they are not known). `end_of_document` is an entry or None. Our weights are rounded to `dtype` first,
    as theirs were.
    """

    config: Config
    vocabulary: int
    checkpoint: Path
    classes: np.ndarray
    end_of_document: int | None
    dtype: torch.dtype


def compare(sides: Sides, theirs: Any, alone: Callable[[], Any] | None = None) -> dict[str, float]:
    """Largest absolute difference of logits under dense attention, and under the run's pattern where it is another.

    theirs: a model of transformers. alone: loads a model that attends by the run's pattern by itself, which is compared
    last. Raises UserError when a difference is not within the tolerance.
    """
    dense = resolve_pattern(AttentionConfig(pattern="dense"), sides.config.model.layers)
    own = resolve_pattern(sides.config.attention, sides.config.model.layers)
    patterns = {"dense": dense} if own.dense else {"dense": dense, sides.config.attention.pattern: own}
    ids = _tokens(sides, own)
    expected = _our_logits(sides, list(patterns.values()), ids)
    device = device_of(ALONE)
    theirs = theirs.to(device).float().eval()
    differences = {}
    for (name, pattern), wanted in zip(patterns.items(), expected, strict=True):
        found = logits_of(theirs, None if pattern is dense else _token_pattern(sides, pattern), ids.to(device))
        differences[name] = _difference(name, found, wanted)
    if alone is not None:
        del theirs
        found = logits_of(alone().to(device).eval(), None, ids.to(device))
        differences[STANDALONE] = _difference(STANDALONE, found, expected[-1])
    return differences


def _difference(name: str, found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference of logits. Raises UserError when it is not within the tolerance."""
    difference = float((found.cpu() - wanted).abs().max())
    limit = max(TOLERANCE, RELATIVE_TOLERANCE * float(wanted.abs().max()))
    if not difference < limit:
        raise UserError(
            f"the two models do not compute the same: under {name} attention logits differ by up to "
            f"{difference:.3g}, and at most {limit:.3g} is allowed; nothing was written."
        )
    return difference


def mask_of(pattern: TokenPattern, ids: Tensor, layer: int = 0) -> Tensor:
    """Mask that a layer of transformers adds to its scores for `pattern`: fp32 [B, 1, S, S], 0 or the lowest float.

    ids: i64 [B, S].
    """
    visible = visible_mask(pattern.plan(ids), pattern.windows[layer], pattern.horizons)
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(visible.shape, device=ids.device).masked_fill(~visible, lowest)[:, None]


@torch.no_grad()
def logits_of(model: Any, pattern: TokenPattern | None, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of a model of transformers in fp32 under `pattern` (None: causal); ids: i64 [B, S]."""
    if pattern is None:
        return model(input_ids=ids, use_cache=False).logits
    masks: dict[int, Tensor] = {}
    for layer, window in enumerate(pattern.windows):
        if window not in masks:
            masks[window] = mask_of(pattern, ids, layer)
    with _masked(model, [masks[window] for window in pattern.windows]):
        return model(input_ids=ids, use_cache=False).logits


@contextmanager
def _masked(model: Any, masks: Sequence[Tensor]) -> Iterator[None]:
    """Give each layer of a model of transformers its mask in place of the causal one."""

    def giving(mask: Tensor) -> Any:
        return lambda module, arguments, keywords: (arguments, {**keywords, "attention_mask": mask})

    hooks = [
        layer.register_forward_pre_hook(giving(mask), with_kwargs=True)
        for layer, mask in zip(model.base_model.layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _our_logits(sides: Sides, patterns: Sequence[AttentionPattern], ids: Tensor) -> list[Tensor]:
    """Logits [1, S, V] of our checkpoint under each pattern; ids: i64 [1, S]."""
    config = replace(
        sides.config,
        parallel=ParallelConfig(),
        attention=replace(sides.config.attention, backend="reference"),
        training=replace(sides.config.training, precision="fp32", recompute="none", compile=False, loss_chunk=0),
    )
    with alone(config) as device:
        model = checkpoints.load_for_evaluation(sides.checkpoint, config, sides.vocabulary, device)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(sides.dtype))
        classes = torch.from_numpy(sides.classes)[ids]
        start = _document_start(ids, sides.end_of_document)
        result = []
        for pattern in patterns:
            plan = pattern.plan(classes.to(device), start.to(device))
            with attending(model, pattern):
                logits = model(ids.to(device), plan)
            result.append(logits[..., : sides.vocabulary].float().cpu())
    return result


def _tokens(sides: Sides, pattern: AttentionPattern) -> Tensor:
    """i64 [1, S]: random tokens, a sixth of them separators where there are any, with ends of documents among them."""
    generator = torch.Generator().manual_seed(0)
    reach = max((layer.reach for layer in pattern.layers if not layer.full), default=1)
    length = min(sides.config.data.sequence_length, max(_LEAST, min(2 * reach, _MOST)))
    ids = torch.randint(sides.vocabulary, (1, length), generator=generator)
    separators = torch.from_numpy(np.flatnonzero(pattern.tier_of_class[sides.classes]))
    if len(separators):
        chosen = separators[torch.randint(len(separators), (1, length), generator=generator)]
        ids = torch.where(torch.rand(1, length, generator=generator) < 1 / 6, chosen, ids)
    if sides.end_of_document is not None:
        ids[:, [length // 3, length // 2]] = sides.end_of_document
    return ids


def _document_start(ids: Tensor, end_of_document: int | None) -> Tensor:
    """i32 [1, S]: position at which each token's document starts, as in training data."""
    starts, start = [], 0
    for position, token in enumerate(ids[0].tolist()):
        starts.append(start)
        start = position + 1 if token == end_of_document else start
    return torch.tensor([starts], dtype=torch.int32)


def _token_pattern(sides: Sides, pattern: AttentionPattern) -> TokenPattern:
    if pattern.separate_documents and sides.end_of_document is None:
        raise UserError("attention.separate_documents=true needs the tokenizer, which tells where documents end.")
    return TokenPattern.of_run(pattern, sides.classes, sides.end_of_document or 0)
