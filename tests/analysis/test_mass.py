"""Attention mass against probabilities that are added up one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sep_attention import visible_mask
from torch import Tensor

from sepllm_train.analysis import mass as mass_module
from sepllm_train.analysis.attention import GROUPS, group_masks, summary
from sepllm_train.analysis.mass import INITIAL, KINDS, Mass, attention_mass, probabilities, visible_rows
from sepllm_train.model.build import build_model
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.runs.evaluate import core_attentions
from tests.model.tiny import LENGTH, LLAMA, PYTHIA, VOCABULARY, micro_batch, tiny_config

WINDOW, INITIAL_TOKENS = 5, 2
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pythia": (PYTHIA, {"separators": ["period", "comma"]}),
    "grouped": (LLAMA, {"full_layers": "first", "qk_norm": True}),
    "sink": (PYTHIA, {"sink": "learned", "separate_documents": True}),
    "tiers": (PYTHIA, {"separators": [{"classes": ["period"], "horizon": 9}, {"classes": ["comma"], "horizon": 20}]}),
    "dense": (PYTHIA, {"pattern": "dense"}),
}


class Measured:
    """A tiny model with real-looking weights, its samples, the mass, and what reached each layer's attention."""

    def __init__(self, case: str, samples: int = 2) -> None:
        model, attention = CASES[case]
        config = tiny_config(model, attention)
        self.pattern = resolve_pattern(config.attention, config.model.layers)
        self.model = build_model(config, VOCABULARY).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                # Initial weights attend almost evenly.
                if "linear_qkv.weight" in name:
                    parameter.normal_(0, 0.3, generator=generator)
                if name.endswith("sink"):
                    parameter.normal_(0, 1, generator=generator)
        data = micro_batch(config, batch=samples)
        classes = data.classes * torch.randint(1, 4, data.classes.shape, generator=generator).to(torch.uint8)
        self.samples = [
            {
                "tokens": data.tokens[number],
                "labels": data.labels[number],
                "separator_class": classes[number],
                "document_start": data.document_start[number],
            }
            for number in range(samples)
        ]
        self.seen: list[dict[int, tuple[Tensor, ...]]] = [{} for _ in self.samples]
        self.mass = self._measure()

    def _measure(self) -> Mass:
        current = iter(range(len(self.samples)))
        number = next(current)

        def advance() -> None:
            nonlocal number
            number = next(current, number)

        def keep(layer: int) -> Any:
            def after(core: Any, inputs: tuple[Tensor, ...], settings: dict[str, Any], output: Tensor) -> None:
                query, key = core.rotated(*inputs[:2], settings["packed_seq_params"])
                self.seen[number][layer] = (query, key, inputs[2], output)

            return after

        handles = [
            core.register_forward_hook(keep(layer), with_kwargs=True)
            for layer, core in enumerate(core_attentions(self.model))
        ]
        result = attention_mass(
            self.model,
            self.pattern,
            self.samples,
            len(self.samples),
            window=WINDOW,
            initial=INITIAL_TOKENS,
            layers=range(4),
            heads=range(4),
            advance=advance,
        )
        for handle in handles:
            handle.remove()
        return result

    def visible(self, number: int, layer: int) -> Tensor:
        """bool [S, S] of a sample and layer."""
        sample = self.samples[number]
        plan = self.pattern.plan(sample["separator_class"][None], sample["document_start"][None])
        return visible_mask(plan, self.pattern.layers[layer].window, self.pattern.layers[layer].horizons)[0]

    def probabilities(self, number: int, layer: int) -> Tensor:
        """[H, S, S] by the definition, with the value vectors' [H, S, D] output checked against the model's."""
        query, key, value, output = (tensor[:, 0] for tensor in self.seen[number][layer])
        groups = query.shape[1] // key.shape[1]
        q, k, v = (t.transpose(0, 1).double() for t in (query, *(x.repeat_interleave(groups, 1) for x in (key, value))))
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~self.visible(number, layer), -torch.inf)
        sink = core_attentions(self.model)[layer].sink
        total = scores.exp().sum(-1, keepdim=True)
        if sink is not None:
            total = total + sink.double().exp()[:, None, None]
        found = scores.exp() / total
        attended = (found @ v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(attended.float(), output, rtol=0, atol=1e-5)
        return found.detach()


@pytest.fixture(scope="module", params=CASES)
def measured(request: pytest.FixtureRequest, grid: torch.device) -> Measured:
    """One case, measured in blocks of seven queries."""
    if grid.type != "cpu":
        pytest.skip("the tiny models are compared on the CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mass_module, "BLOCK_ELEMENTS", 7 * 5 * LENGTH)
        return Measured(request.param)


def test_mass_is_the_sum_of_probabilities(measured: Measured) -> None:
    mass = measured.mass
    assert mass.edges == [0, 1, 2, 4, 5, 8, 16, 32, 48]
    for number, sample in enumerate(measured.samples):
        starts = sample["document_start"] if measured.pattern.separate_documents else torch.zeros(LENGTH)
        kind = [
            INITIAL if place - int(starts[place]) < INITIAL_TOKENS else int(sample["separator_class"][place])
            for place in range(LENGTH)
        ]
        for layer in (0, 3):
            found = measured.probabilities(number, layer)
            visible = measured.visible(number, layer).double()
            even = visible / visible.sum(-1, keepdim=True)
            expected = torch.zeros(5, KINDS, len(mass.edges) - 1, dtype=torch.float64)
            for i in range(LENGTH):
                for j in range(i + 1):
                    place = max(e for e, edge in enumerate(mass.edges) if edge <= i - j)
                    expected[:4, kind[j], place] += found[:, i, j]
                    expected[4, kind[j], place] += even[i, j]
            torch.testing.assert_close(mass.mass[number, layer], expected[:4] / LENGTH, rtol=0, atol=1e-7)
            torch.testing.assert_close(mass.uniform[number, layer], expected[4] / LENGTH, rtol=0, atol=1e-7)


def test_everything_sums_to_one(measured: Measured) -> None:
    mass = measured.mass
    total = mass.mass.sum((-1, -2))
    if core_attentions(measured.model)[0].sink is None:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
        assert (mass.sink == 0).all()
    else:
        left = 1 - torch.stack([measured.probabilities(number, 2).sum(-1).mean(-1) for number in (0, 1)])
        torch.testing.assert_close(mass.sink[:, 2], left, rtol=0, atol=1e-6)
        assert (left > 0.005).all()
    torch.testing.assert_close(mass.uniform.sum((-1, -2)), torch.ones(2, 4, dtype=torch.float64), rtol=0, atol=1e-6)
    masks = group_masks([1, 2], mass.edges, WINDOW)
    assert tuple(masks) == GROUPS and torch.stack(tuple(masks.values())).sum(0).eq(1).all()
    found = summary(mass, [1, 2], WINDOW)
    parts = sum(group["mass"].mean for group in found["groups"].values()) + found["sink"]
    assert parts == pytest.approx(1, abs=1e-6)


def test_rows_are_those_of_the_mask(measured: Measured) -> None:
    sample = measured.samples[1]
    plan = measured.pattern.plan(sample["separator_class"][None], sample["document_start"][None])
    for layer in measured.pattern.layers:
        mask = visible_mask(plan, layer.window, layer.horizons)[0]
        assert torch.equal(visible_rows(plan, layer, 11, 30), mask[11:30])


def test_even_attention_has_a_lift_of_one(grid: torch.device) -> None:
    case = Measured("pythia")
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            if "linear_qkv" in name:
                parameter.zero_()
    found = summary(case._measure(), [1, 2], WINDOW)
    assert found["separators"]["mass"].mean > 0.1
    lifts = [group["lift"] for group in [*found["groups"].values(), *found["classes"], *found["distances"][0].values()]
             if isinstance(group, dict) and group.get("lift") is not None]  # fmt: skip
    assert len(lifts) > 6
    assert lifts == pytest.approx([1.0] * len(lifts), abs=1e-5)
    torch.testing.assert_close(torch.tensor(found["head_lift"]), torch.ones(4, 4), rtol=0, atol=1e-5)


def test_chosen_layers_and_heads_are_those_of_all(measured: Measured) -> None:
    some = attention_mass(
        measured.model,
        measured.pattern,
        measured.samples,
        1,
        window=WINDOW,
        initial=INITIAL_TOKENS,
        layers=[2],
        heads=[3, 1],
    )
    torch.testing.assert_close(some.mass[0, 0], measured.mass.mass[0, 2, [3, 1]], rtol=0, atol=1e-7)


def test_probabilities_of_half_precision_are_computed_in_fp32() -> None:
    query, key = (
        torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.ones(2, 4, 8).bfloat16(),
    )
    visible = torch.tensor([[True, False, False, False], [True, True, False, False], [True, True, True, True]])
    found = probabilities(query, key, visible, 1.0, None)
    assert found.dtype == torch.float32
    # All keys are one vector, so what is visible is attended evenly.
    torch.testing.assert_close(found, (visible / visible.sum(-1, keepdim=True)).expand(2, 3, 4), rtol=0, atol=1e-7)
