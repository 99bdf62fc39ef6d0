"""What the harness is given equals plain computations: one sequence at a time, in plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.attention import Attention, bind
from sepllm_train.evaluation.harness import SeparatorLM
from sepllm_train.evaluation.loading import load_tasks
from sepllm_train.evaluation.run import EvaluationOptions, evaluate, line, tokenizer_for
from sepllm_train.evaluation.stream_model import Opened, open_model
from sepllm_train.generation.choice import AttentionChoice
from sepllm_train.hf import apply_pattern, cache_argument, load_model
from tests.evaluation.conftest import CONTEXT, words

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")

ALL = ("arc_easy", "lambada", "logiqa", "piqa", "wikitext")
CACHE = AttentionChoice("cache", separators=4, capacity=17)


def opened(folder: Path) -> Opened:
    return open_model(str(folder), None, "fp32", "cpu")


def attending(model: Opened, options: AttentionChoice, batch_size: int = 3) -> tuple[SeparatorLM, Attention]:
    lm = SeparatorLM(model.model, tokenizer_for(model, None), batch_size=batch_size)
    attention = bind(model, options)
    lm.attend(attention)
    return lm, attention


def scored(lm: HFLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    made = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return lm.loglikelihood(made, disable_tqdm=True)


def generated(lm: HFLM, prompts: list[str], until: list[str], tokens: int) -> list[str]:
    how = {"until": until, "max_gen_toks": tokens, "do_sample": False}
    made = [Instance("generate_until", {}, (prompt, dict(how)), number) for number, prompt in enumerate(prompts)]
    return lm.generate_until(made, disable_tqdm=True)


# One of the answers has it, and it ends inside a token.
STOP = " then"
PAIRS = [(words(n, 3 + 11 * n), " " + words(n + 2, 1 + n)) for n in range(5)] + [("", words(3, 4))]


def test_dense_results_are_those_of_plain_hflm(exported_run: Path, data_dir: Path) -> None:
    """An exported run, loaded with full attention by the harness itself from its folder."""
    model = opened(exported_run)
    results = evaluate(
        model, tokenizer_for(model, None), [bind(model, AttentionChoice("dense"))], EvaluationOptions(ALL, data_dir)
    )
    plain = HFLM(pretrained=str(exported_run), device="cpu", dtype="float32", batch_size=3, attn_implementation="sdpa")
    with load_tasks(list(ALL), data_dir, None) as loaded:
        for task, result in zip(loaded, results, strict=True):
            found = harness_evaluate(lm=plain, task_dict=task.tasks, bootstrap_iters=0, log_samples=False)
            theirs = {key.split(",")[0]: value for key, value in found["results"][result["harness_task"]].items()}
            assert len(result["metrics"]) >= 2
            for name, entry in result["metrics"].items():
                assert entry["value"] == pytest.approx(theirs[name], rel=1e-6), (task.name, name)
            assert result["attended_share"] == result["kv_share"] == result["kv_share_prompt"] == 1
    lm, _ = attending(model, AttentionChoice("dense"))
    for own, other in zip(scored(lm, PAIRS), scored(plain, PAIRS), strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-6) and own[1] == other[1]
    prompts = [words(n, 5 + 9 * n) for n in range(4)]
    assert generated(lm, prompts, ["they"], 12) == generated(plain, prompts, ["they"], 12)


def loglikelihoods(lm: SeparatorLM, forward: Any) -> list[float]:
    """Of PAIRS, from `forward`: ids [1, T] to logits [1, T, V]."""
    found = []
    for context, continuation in PAIRS:
        prompt = lm.tok_encode(context) if context else [lm.prefix_token_id]
        ids = prompt + lm.tok_encode(context + continuation)[len(prompt) if context else 0 :]
        with torch.no_grad():
            logits = forward(torch.tensor([ids])).log_softmax(-1)[0]
        found.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(prompt), len(ids))))
    return found


@pytest.mark.parametrize(
    "options",
    [
        AttentionChoice(),
        AttentionChoice(window=4, initial=1),
        AttentionChoice("streaming"),
        AttentionChoice("fixed", interval=5),
    ],
    ids=["trained", "narrower", "streaming", "fixed"],
)
def test_patterns_are_the_mask_s_whatever_the_batch(models: dict[str, Path], options: AttentionChoice) -> None:
    lm, attention = attending(opened(models["sep"]), options)
    masked = load_model(str(models["sep"]), dense=True)
    apply_pattern(masked, attention.pattern, implementation="mask")
    expected = loglikelihoods(lm, lambda ids: masked(ids).logits)
    assert [value for value, _ in scored(lm, PAIRS)] == pytest.approx(expected, abs=1e-4)
    dense = load_model(str(models["sep"]), dense=True)
    assert loglikelihoods(lm, lambda ids: dense(ids).logits) != pytest.approx(expected, abs=1e-2)


def test_a_cache_scores_as_token_by_token(models: dict[str, Path]) -> None:
    lm, attention = attending(opened(models["sep"]), CACHE)
    assert attention.generation_cache is not None
    one_by_one = load_model(str(models["sep"]), dense=True)
    made = bind(Opened(one_by_one, lm_tokenizer(models), "sep"), CACHE).generation_cache
    assert made is not None

    def forward(ids: Tensor) -> Tensor:
        cache = made()
        kept = {cache_argument(one_by_one): cache}
        steps = [one_by_one(ids[:, at : at + 1], **kept).logits for at in range(ids.shape[1])]
        return torch.cat(steps, 1)

    expected = loglikelihoods(lm, forward)
    assert [value for value, _ in scored(lm, PAIRS)] == pytest.approx(expected, abs=1e-4)


def lm_tokenizer(models: dict[str, Path]) -> Any:
    return opened(models["sep"]).tokenizer


@pytest.mark.parametrize("options", [AttentionChoice(), AttentionChoice("streaming"), CACHE], ids=lambda o: o.name)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation(models: dict[str, Path], options: AttentionChoice, batch_size: int) -> None:
    """Prompts of different lengths; answers and counts are those of plain generation of each alone."""
    lm, attention = attending(opened(models["sep"]), options, batch_size)
    prompts = [words(n, 4 + 13 * n) for n in range(4)]
    answers = generated(lm, prompts, [STOP], 14)
    found = lm.shares.summary()
    alone = load_model(str(models["sep"]), dense=True)
    bound = bind(Opened(alone, lm_tokenizer(models), "sep"), options)
    if attention.policies is None:
        apply_pattern(alone, attention.pattern, implementation="mask")
    held = tokens = ended = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([lm.tok_encode(prompt)])
        cache = {} if attention.policies is None else {cache_argument(alone): bound.generation_cache()}
        made = alone.generate(ids, max_new_tokens=14, do_sample=False, **cache)[0, ids.shape[1] :].tolist()
        stops = [n for n in range(len(made) + 1) if stopped(lm.tok_decode(made[:n], skip_special_tokens=False))]
        used = made[: stops[0]] if stops else made
        ended += bool(stops)
        assert answer == lm.tok_decode(used).split(STOP)[0]
        if attention.policies is not None:
            once = bound.generation_cache()
            with torch.no_grad():
                alone(
                    torch.cat((ids, torch.tensor([used[:-1]], dtype=torch.int64)), 1), **{cache_argument(alone): once}
                )
            held += once.mean_length * once.columns_seen
            tokens += once.columns_seen * (once.columns_seen + 1) // 2
    assert 0 < ended < 4 and found["sequences"] == 4 and found["kv_share"] < found["attended_share"] < 1
    if attention.policies is not None:
        assert found["attended_share"] == pytest.approx(held / tokens)


def test_shares_that_were_not_counted_are_a_dash() -> None:
    none = dict.fromkeys(("attended_share", "kv_share", "kv_share_prompt"))
    common = {"task": "piqa", "attention": {"label": "dense"}, "metrics": {}, "limit": None, "documents": 2}
    told = line({**common, **none, "num_fewshot": 0, "seconds": 1})
    assert "attended - | KV kept - at the prompt's end, - mean" in told


def stopped(text: str) -> bool:
    return STOP in text or "<|endoftext|>" in text


def test_prompts_that_do_not_fit(models: dict[str, Path]) -> None:
    model = opened(models["sep"])
    lm, _ = attending(model, AttentionChoice())
    pairs = [(words(0, 2 * CONTEXT), " they")]
    with pytest.raises(UserError, match=r"a prompt has [\d,]+ tokens and the model's context 4,096: give fewer ex"):
        scored(lm, pairs)
    with pytest.raises(UserError, match="a prompt with its answer has [0-9],[0-9]+ tokens"):
        generated(lm, [words(0, CONTEXT - 20)], ["x"], 300)
    lm.truncate = True
    shown = lm.tok_encode(pairs[0][0])[-CONTEXT:]
    (found,) = scored(lm, pairs)
    with torch.no_grad():
        lm.attention.install(lm.model)  # type: ignore[union-attr]
        logits = lm.model(torch.tensor([shown]), use_cache=False).logits.log_softmax(-1)
    assert found[0] == pytest.approx(float(logits[0, -1, lm.tok_encode(" they")[0]]), abs=1e-4)
    assert lm.truncated == 1


@pytest.mark.parametrize(
    ("context", "choice"),
    [
        ("the cat and the r", "est"),
        ("the cat and the r", "est went home."),
        ("the cat and the rest", ""),
        ("", ""),
    ],
    ids=["whole", "in part", "empty", "nothing"],
)
def test_a_choice_that_the_tokenizer_joins_to_its_context_is_refused(
    models: dict[str, Path], context: str, choice: str
) -> None:
    """No token is the choice's alone, or its first is lost: its likelihood would be 1 or of another text."""
    lm, _ = attending(opened(models["sep"]), AttentionChoice())
    made = [
        Instance("loglikelihood", {}, pair, number, ("arc_easy", 10 + number, 1))
        for number, pair in enumerate([PAIRS[2], (context, choice)])
    ]
    with pytest.raises(UserError, match=f"document 11 of arc_easy: .*{choice!r}"):
        lm.loglikelihood(made)
    with pytest.raises(UserError, match="document 11 of arc_easy"):
        lm.check("arc_easy", made)


def test_names_of_special_tokens_are_text(models: dict[str, Path], exported_run: Path, tmp_path: Path) -> None:
    """To evaluations of a run, of what is exported of it, of an older export and of a model of somebody else, as they
    are in training and in streams."""
    older = tmp_path / "older"
    shutil.copytree(models["dense"], older)
    settings = json.loads((older / "tokenizer_config.json").read_text())
    settings.pop("split_special_tokens", None)
    (older / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "A <unk> of <s>the cat</s>.<|endoftext|> <pad>\u2581 went home"
    for folder in (exported_run, exported_run.parent / "books_sep", models["sep"], older):
        model = opened(folder)
        lm = SeparatorLM(model.model, tokenizer_for(model, None), batch_size=1)
        for each in (text, f"</s>{text}", f"<|endoftext|>{text}"):
            (expected,) = model.tokenizer.encode_batch([each])
            assert lm.tok_encode(each) == expected, folder
        (ids,) = lm.tok_batch_encode([text])[0].tolist()
        assert ids == model.tokenizer.encode_batch([text])[0]
