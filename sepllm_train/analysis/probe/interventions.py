"""What far separators' values are worth to a trained model: losses with the values of others in their place.

The rule, which has stayed as it was when the first model was asked: the replacement that decides takes values of
separators of the same class in another text, a segment that has nothing to do with this one; and

    share = (loss with values replaced - loss) / (loss with far separators masked - loss)

on far-recall tokens that stacked windows cannot explain. A sink's value says nothing of its segment, so another's does
as well, and the share is near 0; of a summary nothing is left, and the share is near 1. Over 0.5 supports "summary",
under 0.2 refutes it, and between them nothing is decided. It takes three seeds. Without a loss from masking there is
nothing to share. What the rule would say of an earlier segment of the same text is told beside it: that segment has
the same subject and many of the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sepllm_train.analysis.probe.values import Values, donors_before, donors_elsewhere, recording, replacing, taken
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pattern import AttentionPattern
from sepllm_train.runs.evaluate import attending
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
        return model(self.batch["tokens"], plan, labels=labels)[0].float()


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
