"""Worth of far separators' values to a trained model: losses with the values of others in their place.

The rule, which has stayed as it was when the first model was asked: the replacement that decides takes values of
separators of the same class in another text, a segment that has nothing to do with this one; and

    share = (loss with values replaced - loss) / (loss with far separators masked - loss)

on far-recall tokens that stacked windows cannot explain. A sink's value says nothing of its segment, so another's does
as well, and the share is near 0; of a summary nothing is left, and the share is near 1. Over 0.5 supports "summary",
under 0.2 refutes it, and between them nothing is decided. It takes three seeds. Without a loss from masking there is
nothing to share. The verdict of the rule on an earlier segment of the same text is reported beside it: that segment
has the same subject and many of the same words.

Attention is linear in the values. For query i and separator j at a distance of the window or more, with p(i, j) the
softmax over all keys that i sees (learned sink included), the output changes by

    sum over such j of p(i, j) (v'(j) - v(j))

with v' the value put in the place of v. Queries that see j as a neighbour get v. Keys, and so p, are those of the model
itself, layer by layer. Shape letters: S tokens, H heads, N key/value heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sepllm_train.analysis.mass import Scores
from sepllm_train.model.attention import SeparatorAttention
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.runs.evaluate import attending, core_attentions
from sepllm_train.runs.open import TrainedRun
from sepllm_train.runs.variations import classes_of, without_classes

# Conditions beside the model as it is. The first of the replacements decides.
MASKED = "masked"
DECIDING = "another text"
BESIDE = "another segment"
REPLACED = (DECIDING, BESIDE, "class mean", "zero")
CONDITIONS = ("as trained", MASKED, *REPLACED)
SUPPORTS, REFUTES = 0.5, 0.2
SEEDS = 3
# Values of the tokens of a sequence in each layer, [S, N, D] each.
Values = list[Tensor]


@dataclass(frozen=True, eq=False)
class Text:
    """One held-out sequence on the model's device: tokens, labels, separator_class, document_start [1, S]."""

    batch: dict[str, Tensor]

    @classmethod
    def of(cls, sample: dict[str, Tensor], device: torch.device) -> Text:
        """From a sample of a dataset."""
        return cls({key: value[None].to(device) for key, value in sample.items()})

    @property
    def classes(self) -> Tensor:
        """Separator class of each token, u8 [S]."""
        return self.batch["separator_class"][0]

    def forward(self, model: SepGPTModel, pattern: AttentionPattern, *, loss: bool = True) -> Tensor:
        """Loss of each token, fp32 [S], or without `loss` the logits [S, padded vocabulary]."""
        plan = pattern.plan(self.batch["separator_class"], self.batch["document_start"])
        labels = self.batch["labels"] if loss else None
        positions = pattern.positions(self.batch["document_start"])
        return model(self.batch["tokens"], plan, labels=labels, positions=positions)[0].float()


def far_separators(pattern: AttentionPattern, sequence: Text) -> Tensor:
    """Keys that are seen beyond the window because they are separators, not initial tokens: bool [S]."""
    table = torch.from_numpy(pattern.tier_of_class).to(sequence.classes.device)
    chosen = table[sequence.classes.long()] > 0
    position = torch.arange(len(chosen), device=chosen.device)
    start = sequence.batch["document_start"][0] if pattern.separate_documents else 0
    return chosen & (position - start >= pattern.initial_tokens)


@torch.no_grad()
def intervene(
    run: TrainedRun, samples: int, seed: int = 0, advance: Callable[[], object] = lambda: None
) -> dict[str, Tensor]:
    """Losses of the first `samples` held-out samples of a run under each of CONDITIONS: f32 [N, S] each.

    Calls `advance` twice for each sample: after the model as it is, and after the rest.
    """
    device = next(run.model.parameters()).device
    texts = [Text.of(run.validation[number], device) for number in range(samples)]
    found: dict[str, list[Tensor]] = {name: [] for name in CONDITIONS}
    means = ClassMeans()
    for text in texts:
        with recording(run.model) as values:
            found["as trained"].append(text.forward(run.model, run.pattern).cpu())
        means.add(values, text.classes, far_separators(run.pattern, text))
        advance()
    masked = without_classes(run.pattern, classes_of(run.pattern))
    for number, text in enumerate(texts):
        with attending(run.model, masked):
            found[MASKED].append(text.forward(run.model, masked).cpu())
        chosen = far_separators(run.pattern, text)
        for name, values in _replacements(run, texts, number, chosen, means, seed):
            with replacing(run.model, values, chosen):
                found[name].append(text.forward(run.model, run.pattern).cpu())
        advance()
    return {name: torch.stack(losses) for name, losses in found.items()}


def _replacements(
    run: TrainedRun, texts: list[Text], number: int, chosen: Tensor, means: ClassMeans, seed: int
) -> Iterator[tuple[str, Values]]:
    """(condition, values of each layer) for text `number`."""
    generator = torch.Generator().manual_seed(seed * len(texts) + number)
    text, other = texts[number], texts[(number + 1) % len(texts)]
    with recording(run.model) as own:
        text.forward(run.model, run.pattern)
    with recording(run.model) as others:
        other.forward(run.model, run.pattern)
    classes, mask = text.classes.cpu(), chosen.cpu()
    donor_classes = (other.classes * far_separators(run.pattern, other)).cpu()
    elsewhere = donors_elsewhere(classes, mask, donor_classes, generator).to(chosen.device)
    before = donors_before(classes, mask, generator).to(chosen.device)
    yield DECIDING, taken(others, elsewhere, own)
    yield BESIDE, taken(own, before, own)
    yield "class mean", means.of(text.classes, own)
    yield "zero", [torch.zeros_like(layer) for layer in own]


class ClassMeans:
    """Mean values of far separators of each class, in each layer."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts = torch.zeros(0)

    def add(self, values: Values, classes: Tensor, chosen: Tensor) -> None:
        """Take in a sequence: values [S, N, D] of each layer, classes u8 [S], chosen bool [S]."""
        if not self._sums:
            self._sums = [torch.zeros(256, *layer.shape[1:], device=layer.device) for layer in values]
            self._counts = torch.zeros(256, device=classes.device)
        numbers = classes[chosen].long()
        self._counts += torch.bincount(numbers, minlength=256)
        for total, layer in zip(self._sums, values, strict=True):
            total.index_add_(0, numbers, layer[chosen].float())

    def of(self, classes: Tensor, own: Values) -> Values:
        """The mean of each token's class [S, N, D] in each layer; 0 for a class without a far separator."""
        count = self._counts.clamp(min=1)[:, None, None]
        return [(total / count)[classes.long()].to(layer.dtype) for total, layer in zip(self._sums, own, strict=True)]


@contextmanager
def recording(model: SepGPTModel) -> Iterator[Values]:
    """Gives a list that a forward pass of one sequence inside the block fills with the values of each layer."""
    values: Values = []

    def before(core: SeparatorAttention, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
        values.append(inputs[2][:, 0].clone())

    with ExitStack() as stack:
        for core in core_attentions(model):
            stack.callback(core.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield values


@contextmanager
def replacing(model: SepGPTModel, values: Sequence[Tensor], chosen: Tensor) -> Iterator[None]:
    """Let far queries read `values` [S, N, D] of each layer at the keys `chosen`, bool [S], inside the block.

    For forward passes of one sequence. A query at a distance below its layer's window reads the key's own value.
    """
    with ExitStack() as stack:
        for core, replaced in zip(core_attentions(model), values, strict=True):
            hook = _corrected(replaced, chosen)
            stack.callback(core.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _corrected(replaced: Tensor, chosen: Tensor) -> Callable[..., Tensor]:
    """The hook that changes a layer's output [S, 1, H * D] by what the replaced values change."""

    def after(core: SeparatorAttention, inputs: tuple[Tensor, ...], settings: dict[str, Any], out: Tensor) -> Tensor:
        change = ((replaced - inputs[2][:, 0]) * chosen[:, None, None]).transpose(0, 1).float()  # [N, S, D]
        weight, _ = Scores.of(core, inputs, settings).rows(0, len(out))
        position = torch.arange(len(out), device=out.device)
        weight *= position[:, None] - position >= core.layer.window
        changed = weight @ change.repeat_interleave(len(weight) // len(change), 0)  # [H, S, D]
        return out + changed.transpose(0, 1).flatten(1)[:, None].to(out.dtype)

    return after


def donors_elsewhere(classes: Tensor, chosen: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """For each chosen key the position of a separator of its class in another sequence, i64 [S].

    classes: u8 [S] of this sequence; chosen: bool [S]; other: u8 [S'] classes of the other one, 0 where a token can be
    no donor. Drawn at random; where the other sequence has none of the class, among all that it has. -1 where a key is
    not chosen or the other sequence has no donor at all.
    """
    donors = torch.full((len(classes),), -1)
    every = other.nonzero()[:, 0]
    for number in classes[chosen].unique().tolist():
        same = (other == number).nonzero()[:, 0]
        pool = same if len(same) else every
        mine = (chosen & (classes == number)).nonzero()[:, 0]
        if len(pool):
            donors[mine] = pool[torch.randint(len(pool), (len(mine),), generator=generator)]
    return donors


def donors_before(classes: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """For each chosen key the position of an earlier chosen one of its class in the same sequence, i64 [S].

    Earlier, so that no query learns of what comes after it. -1 for the first of a class and where none is chosen.
    """
    donors = torch.full((len(classes),), -1)
    for number in classes[chosen].unique().tolist():
        mine = (chosen & (classes == number)).nonzero()[:, 0]
        if len(mine) > 1:
            place = torch.rand(len(mine) - 1, generator=generator) * torch.arange(1, len(mine))
            donors[mine[1:]] = mine[place.long()]
    return donors


def taken(values: Values, donors: Tensor, own: Values) -> Values:
    """Values of each layer with those at position donors[j] of `values` at j; `own` where donors[j] is -1."""
    there = (donors >= 0)[:, None, None]
    return [torch.where(there, layer[donors.clamp(min=0)], mine) for layer, mine in zip(values, own, strict=True)]
