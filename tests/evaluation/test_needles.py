"""RULER's needles: what a record holds, its length, and its score through the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.needles import ANSWER, DEPTHS, KINDS, make_needles
from sepllm_train.evaluation.options import NeedleOptions
from tests.evaluation.conftest import words
from tests.support.command import command, program

TEXT = ". ".join(words(number, 4 + number % 9) for number in range(400)) + "."


def make(kind: str, length: int = 600, count: int = 3, seed: int = 0, text: str | None = TEXT) -> list[dict[str, Any]]:
    return make_needles(str.split, kind, length, count, seed, text)


@pytest.mark.parametrize("kind", KINDS)
def test_records(kind: str) -> None:
    made = make(kind)
    assert made == make(kind) and made != make(kind, seed=1) and len(made) == 3
    for number, record in enumerate(made):
        prompt = f"{record['input']} {record['gen_prefix']}"
        assert record["index"] == number and record["max_length"] == 600
        # A line of noise has 19 words.
        assert 600 - 20 < record["length"] == len(prompt.split()) + ANSWER <= 600
        assert len(record["outputs"]) == (4 if kind in ("niah_multivalue", "niah_multiquery") else 1)
        for answer in record["outputs"]:
            assert record["input"].count(f" is: {answer}.") == 1 and answer not in record["gen_prefix"]
    needles = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(kind, 1)
    found = made[0]["input"].count("One of the special magic ")
    assert found > 20 if KINDS[kind].haystack == "needles" else found == needles


def test_needles_are_at_every_depth() -> None:
    made = make("niah_single_2", count=2 * len(DEPTHS))
    assert {record["depth"] for record in made[: len(DEPTHS)]} == set(DEPTHS)
    for record in made:
        start = record["input"].index("\n")
        body = record["input"][start : record["input"].rindex("\n")]
        place = body.index("One of the special") / (len(body) - 75)
        assert place == pytest.approx(record["depth"] / 100, abs=0.08)


def test_the_question_is_ruler_s() -> None:
    (record,) = make("niah_single_1", count=1)
    key = record["gen_prefix"].split()[5]
    assert record["input"].startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\nThe grass is green."
    )
    assert f"\nOne of the special magic numbers for {key} is: {record['outputs'][0]}.\n" in record["input"]
    assert record["input"].endswith(f"\nWhat is the special magic number for {key} mentioned in the provided text?")
    (several,) = make("niah_multiquery", count=1)
    assert several["input"].startswith("Some special magic numbers are hidden within")
    assert several["gen_prefix"].endswith("mentioned in the provided text are") and ", and " in several["gen_prefix"]


@pytest.mark.parametrize(
    ("kind", "length", "text", "sentence"),
    [
        ("niah_single_4", 600, TEXT, "the needle task 'niah_single_4' is unknown: choose from niah_single_1, "),
        ("niah_single_1", 150, None, "niah_single_1 of 150 tokens has no room for a needle: 205 are the fewest"),
        ("niah_single_2", 600, None, "niah_single_2 hides its needles in a text: give one with --haystack FILE"),
        ("niah_single_2", 600, "too short", "the haystack of 2 words is too short for niah_single_2 of 600 tokens"),
    ],
)
def test_mistakes(kind: str, length: int, text: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(kind, length, text=text)


def test_a_file_of_records(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    asked = ["--tokenizer", models["sep"] / "tokenizer.json", "--lengths", "500,700", "--count", 2]
    asked += ["--kinds", "niah_single_2,niah_multikey_2", "--haystack", tmp_path / "book.txt"]
    command("evaluate needles")([*asked, "--output", tmp_path / "made.jsonl"])
    records = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert [record["task"] for record in records] == 4 * ["niah_single_2"] + 4 * ["niah_multikey_2"]
    assert [record["max_length"] for record in records] == 4 * [500, 700]
    assert [record["index"] for record in records] == 2 * [0, 1, 2, 3]
    with pytest.raises(SystemExit) as ended:
        program("evaluate")(["needles", *asked, "--output", tmp_path / "made.jsonl"])
    assert ended.value.code == 2 and "made.jsonl exists already" in capsys.readouterr().err


def test_kinds_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kinds in ("", "niah_single_1,niah_single_1"):
        with pytest.raises(SystemExit) as ended:
            program("evaluate needles")(
                ["--tokenizer", "none.json", "--kinds", kinds, "--output", tmp_path / "made.jsonl"]
            )
        assert ended.value.code == 2 and "--kinds must name at least one task" in capsys.readouterr().err


def test_what_is_asked_for_is_hidden_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are few words to make keys of."""
    monkeypatch.setattr("sepllm_train.evaluation.needles._KEYS", ("red-cat", "blue-dog"))
    (record,) = make_needles(lambda text: text.split(), "niah_multikey_2", 600, 1, 0, None)
    key = "red-cat" if "red-cat" in record["gen_prefix"] else "blue-dog"
    assert record["input"].count(f"for {key} is") == 1


def test_the_score_is_the_share_of_answers_that_are_found(models: dict[str, Path], tmp_path: Path) -> None:
    """By a model that is told what to answer: of four values half are right at one length, none at the other."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from sepllm_train.evaluation.attention import bind
    from sepllm_train.evaluation.harness import SeparatorLM
    from sepllm_train.evaluation.run import EvaluationOptions, evaluate, tokenizer_for
    from sepllm_train.evaluation.stream_model import open_model
    from sepllm_train.generation.choice import AttentionChoice

    (tmp_path / "book.txt").write_text(TEXT)
    model = open_model(str(models["sep"]), None, "fp32", "cpu")
    tokenizer = tokenizer_for(model, None)
    lm = SeparatorLM(model.model, tokenizer, batch_size=4)
    needles = NeedleOptions((900, 1400), 2, 0, tmp_path / "book.txt")
    records = [make_needles(lm.tok_encode, "niah_multivalue", length, 2, 0, TEXT) for length in needles.lengths or ()]
    answers = {record["input"]: record["outputs"] for record in records[0]}

    def generate_until(self: SeparatorLM, requests: Any, disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in requests:
            prompt, how = request.args
            assert how["max_gen_toks"] == ANSWER and len(lm.tok_encode(prompt)) + ANSWER <= 1400
            known = next((outputs for text, outputs in answers.items() if prompt.startswith(text)), [])
            found.append(" and ".join(known[:2]))
        return found

    options = EvaluationOptions(("niah_multivalue",), needles=needles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeparatorLM, "generate_until", generate_until)
        (result,) = evaluate(model, tokenizer, [bind(model, AttentionChoice())], options)
    scores = {name: entry["value"] for name, entry in result["metrics"].items()}
    assert scores == {"string_match_all": 0.25, "900": 0.5, "1400": 0.0}
    assert result["documents"] == 4 and result["data"]["made"]["haystack"] == str(tmp_path / "book.txt")


def test_needles_through_a_model(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the pattern, a cache and full attention; too long ones and a text that is missing end with a sentence."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    asked = [models["sep"], "--tasks", "niah_single_1", "--count", 2, "--limit", 2]
    program("evaluate")([*asked, "--lengths", "600,700", "--output", tmp_path, "--baselines",
                         "dense,cache:capacity=40:separators=4"])  # fmt: skip
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(found) == 3 and all(
        result["metrics"].keys() == {"string_match_all", "600", "700"} for result in found.values()
    )
    pattern = found["niah_single_1.pattern"]
    assert pattern["data"]["source"] == "needles" and len(pattern["data"]["files"]["test"]["sha256"]) == 64
    assert pattern["documents"] == 2 and pattern["kv_share"] < 1
    for more, sentence in (
        (["--lengths", "5000"], "niah_single_1 of 5,000 tokens is longer than the model's context of 4,096"),
        (["--lengths", "0"], "--lengths 0 must be at least 1"),
        (["--lengths", "600", "--haystack", "nothing.txt"], "--haystack nothing.txt is not a file"),
        (["--tasks", "niah_single_2"], "niah_single_2 hides its needles in a text: give one with --haystack FILE"),
    ):
        with pytest.raises(SystemExit) as ended:
            program("evaluate")([*asked, *more])
        assert ended.value.code == 2 and f"error: {sentence}" in capsys.readouterr().err
