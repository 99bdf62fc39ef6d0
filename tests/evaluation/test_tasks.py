"""Local files give the prompts, targets and metrics of the harness's own tasks; the hub's tasks are wired."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

import datasets
import yaml
from lm_eval.api.task import ConfigurableTask

from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.attention import bind
from sepllm_train.evaluation.loading import Loaded, load_tasks
from sepllm_train.evaluation.run import EvaluationOptions, evaluate, tokenizer_for
from sepllm_train.evaluation.stream_model import open_model
from sepllm_train.evaluation.tasks import EVALUATED, TASKS, articles
from sepllm_train.generation.choice import AttentionChoice
from tests.evaluation.conftest import choice, words

LOCAL = [name for name, task in TASKS.items() if task.convert is not None]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def hub_records(name: str, data_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The local files by split in the hub's form, written down here a second time."""
    if name == "wikitext":
        text = (data_dir / "wikitext2/valid.txt").read_text()
        cut = text.index(" = a dog =")
        return {"validation": [{"page": text[:cut]}, {"page": text[cut:]}]}
    found = {split: data_dir / path for split, path in TASKS[name].files.items() if (data_dir / path).is_file()}
    splits = {split: read(path) for split, path in found.items()}
    forms: dict[str, Any] = {
        "arc_easy": lambda r: {
            "question": r["question"],
            "choices": {"text": r["choices"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[r["answer"]],
        },
        "logiqa": lambda r: {
            "context": r["context"],
            "question": r["question"],
            "options": r["choices"],
            "label": "abcd"[r["answer"]],
        },
        "piqa": lambda r: {
            "goal": r["question"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["answer"]
        },
    }  # fmt: skip
    forms["arc_challenge"] = forms["arc_easy"]
    forms["openbookqa"] = lambda r: {"question_stem": r["question"], **forms["arc_easy"](r)}
    form = forms.get(name, dict)
    return {split: [form(record) for record in records] for split, records in splits.items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    """A hub that has the local files, SciQ and MMLU."""

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        if path == "allenai/sciq":
            names = ("distractor1", "distractor2", "distractor3", "correct_answer")
            answers = [dict(zip(names, choice(number)["choices"], strict=True)) for number in range(4)]
            one = [{"question": words(n, 5), "support": words(n, 9), **made} for n, made in enumerate(answers)]
            splits = {"train": one, "validation": one, "test": one}
        elif path == "cais/mmlu":
            splits = {"dev": [choice(number) for number in range(5)], "test": [choice(7), choice(9)]}
        else:
            known = {
                "EleutherAI/lambada_openai": "lambada",
                "EleutherAI/logiqa": "logiqa",
                "baber/piqa": "piqa",
                "allenai/openbookqa": "openbookqa",
                "openai/gsm8k": "gsm8k_cot",
                "EleutherAI/wikitext_document_level": "wikitext",
            }
            arc = "arc_challenge" if name == "ARC-Challenge" else "arc_easy"
            splits = hub_records(known.get(path, arc), data_dir)
            if known.get(path) == "wikitext":
                splits["test"] = splits["validation"]
            for split in ("train", "validation"):
                splits.setdefault(split, next(iter(splits.values())))
        return {split: datasets.Dataset.from_list(records) for split, records in splits.items()}

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load)


@pytest.fixture
def loaded(data_dir: Path, request: pytest.FixtureRequest) -> Iterator[Loaded]:
    with load_tasks([request.param], data_dir, 0) as (task,):
        yield task


def requests(task: ConfigurableTask, shots: int = 0) -> list[Any]:
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1)
    task.build_all_requests()
    return [(one.request_type, one.args) for one in task.instances]


@pytest.mark.parametrize("loaded", LOCAL, indirect=True)
def test_local_files_give_the_harness_s_requests(
    loaded: Loaded, hub: None, data_dir: Path, request: pytest.FixtureRequest
) -> None:
    (own,) = loaded.tasks["tasks"].values()
    with load_tasks([loaded.name], None, 0) as (theirs,):
        (other,) = theirs.tasks["tasks"].values()
        other.config.test_split = own.config.test_split
        other.task_docs = other.eval_docs
        assert requests(own) == requests(other) and requests(own)
        assert own.aggregation().keys() == other.aggregation().keys()
        assert (own.VERSION, own.higher_is_better()) == (other.VERSION, other.higher_is_better())
        if loaded.name.startswith(("arc", "gsm8k")):
            assert requests(own, 3) == requests(other, 3)


def test_gsm8k_shows_its_eight_examples(data_dir: Path) -> None:
    with load_tasks(["gsm8k_cot"], data_dir, None) as (task,):
        (own,) = task.tasks["tasks"].values()
        prompt = requests(own, task.shots)[0][1][0]
    assert task.shots == 8 and prompt.count("Q: ") == 9
    assert prompt.startswith("Q: There are 15 trees") and prompt.endswith("\nA:")


def test_piqa_never_shows_the_question_itself(data_dir: Path) -> None:
    """Its only file is evaluated, and the examples are of it."""
    with load_tasks(["piqa"], data_dir, 4) as (task,):
        (own,) = task.tasks["tasks"].values()
        for _, (prompt, _) in requests(own, 4):
            *before, last = prompt.split("\n\n")
            assert len(before) == 4 and not any(example.startswith(last) for example in before)


@pytest.mark.parametrize("name, tasks, shots", [("sciq", 1, 0), ("mmlu", 57, 5), ("lambada", 1, 0)])
def test_tasks_of_the_hub(hub: None, name: str, tasks: int, shots: int) -> None:
    with load_tasks([name], None, None) as (task,):
        assert len(task.tasks["tasks"]) == tasks and task.shots == shots and task.data == {"source": "hub"}
        assert task.split == "test"


def test_a_group_is_one_result(hub: None, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """MMLU: 57 subtasks of two documents each; the accuracy is over all of them."""
    model = open_model(str(models["sep"]), None, "fp32", "cpu")
    options = EvaluationOptions(("mmlu",), shots=1)
    (result,) = evaluate(model, tokenizer_for(model, None), [bind(model, AttentionChoice())], options)
    # The subtasks and the four groups between them and the whole.
    assert result["documents"] == 114 and len(result["subtasks"]) == 57 + 4
    assert 0 <= result["metrics"]["acc"]["value"] <= 1 and result["num_fewshot"] == 1
    # Few of the prompts are distinct: they differ by the subject's name.
    assert 57 <= result["sequences"] <= 114 and result["kv_share"] < 1


def test_data_that_cannot_be_had() -> None:
    sentence = r"the data of sciq cannot be loaded \(.*\): give local files with --data-dir"
    with pytest.raises(UserError, match=sentence), load_tasks(["sciq"], None, None):
        pass


def test_articles() -> None:
    text = " \n = One = \n \n a b . \n = = Part = = \n c \n = Two = \n d\n"
    assert articles(text) == [" \n = One = \n \n a b . \n = = Part = = \n c \n", " = Two = \n d\n"]
    assert articles("no titles\nat all") == ["no titles\nat all"]
    assert articles(" = A = \n a\n = = B = = \n b\n = C = \n c\n") == [
        " = A = \n a\n = = B = = \n b\n",
        " = C = \n c\n",
    ]


def test_only_line_feeds_end_a_record(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 and U+0085 as they are."""
    texts = ["one\u2028two home", "three\u0085four home"]
    path = tmp_path / "lambada_openai_test.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf8")
    with load_tasks(["lambada"], tmp_path, None) as (task,):
        (own,) = task.tasks["tasks"].values()
        assert [request[0] + request[1] for _, request in requests(own)] == texts


def test_a_file_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """With a byte order mark, blank lines, and keys of its own that are of another type in every line."""
    lines = ["", '{"text": "the cat went", "id": 1}', "", '{"text": "a dog home", "id": "two", "more": [1]}', "", ""]
    (tmp_path / "lambada_openai_test.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    with load_tasks(["lambada"], tmp_path, 0) as (task,):
        made = [arguments for _, arguments in requests(next(iter(task.tasks["tasks"].values())))]
    assert made == [("the cat", " went"), ("a dog", " home")]


def test_definitions_are_removed(data_dir: Path) -> None:
    with load_tasks(["lambada"], data_dir, None) as (task,):
        (own,) = task.tasks["tasks"].values()
        made = Path(own.config.metadata["config_source"])
        assert yaml.safe_load(made.read_text())["include"].endswith("lambada_openai.yaml")
    assert not made.exists()


CUT = '{"question": "a", "choices": ["b", "c"]}'


def record(**changes: Any) -> str:
    return json.dumps({"question": "a", "choices": ["b", "c"], "answer": 1, **changes})


MISTAKES: dict[str, tuple[str, str | None, str]] = {
    "no file": ("arc_easy", None, r"arc_easy needs .*arc/arc_easy_test.jsonl, and it is not there"),
    "no field": ("arc_easy", CUT, r"line 1 of .* is not a record .* no 'answer' and needs question, choices, answer"),
    "wrong answer": ("arc_easy", record(answer=2), r"line 1 of .*: answer 2 is not the number of one of the choices"),
    "not JSON": ("arc_easy", "{", r"arc_easy_test.jsonl line 1 is not JSON .*: a record of its task has question, "),
    "not a record": (
        "arc_easy",
        "7",
        r"arc_easy_test.jsonl line 1 does not hold a JSON object: a record of its task has",
    ),
    "digits": (
        "arc_easy",
        f"{record()}\n{record(answer=10**400)}",
        r"line 2 is not JSON of this kind \(a number of 401",
    ),
    "depth": ("lambada", f'{{"text": "a b", "x": {"[" * 9999}', r"line 1 is not JSON of this kind \(nested too deeply"),
    "infinite": ("arc_easy", record(answer=float("inf")), r"line 1 is not JSON of this kind \(Infinity"),
    "half a character": (
        "lambada",
        '{"text": "a \\ud800"}',
        r"line 1 is not JSON of this kind \(half of a character\)",
    ),
    "not UTF-8": ("lambada", "\udcff", r"line 1 is not UTF-8 text"),
    "blank": ("lambada", " \n\n", r"lambada_openai_test.jsonl is empty"),
    "no article": ("wikitext", " \n\n", r"wikitext2/test.txt is empty"),
    "null": ("arc_easy", record(question=None), r"line 1 of .*: its 'question' must be a string"),
    "bool": ("arc_easy", record(answer=True), r"line 1 of .*: its 'answer' must be an integer"),
    "numbers": ("arc_easy", record(choices=["b", 3]), r"line 1 of .*: its 'choices' must be a list of strings"),
    "nine choices": ("arc_easy", record(choices=list("abcdefghi")), r"line 1 of .*: it has 9 choices and needs 2 to 8"),
    "null text": ("lambada", '{"text": "a b"}\n{"text": null}', r"line 2 of .*: its 'text' must be a string"),
    "five choices": (
        "logiqa",
        record(context="d", choices=list("abcde"), answer=4),
        r"it has 5 choices and needs 2 to",
    ),
    "three choices": ("piqa", record(choices=list("abc")), r"line 1 of .*: it has 3 choices and needs 2\."),
    "empty": ("arc_easy", "", r"arc_easy_test.jsonl is empty"),
    "no form of its own": ("mmlu", None, r"mmlu_[a-z_]+ needs .*/cais/mmlu/[a-z_]+/SPLIT.jsonl or .parquet"),
    "unknown": ("hellswag", None, r"the task 'hellswag' is unknown: choose from arc_challenge, .*; nearest: hellaswag"),
    "mistyped": ("lambda", None, r"the task 'lambda' is unknown: choose from .*; nearest: lambada, "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path: Path, mistake: str) -> None:
    name, content, sentence = MISTAKES[mistake]
    if content is not None:
        path = tmp_path / next(TASKS[name].files[split] for split in EVALUATED if split in TASKS[name].files)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf8", errors="surrogateescape")
    with pytest.raises(UserError, match=sentence), load_tasks([name], tmp_path, None):
        pass


def test_more_examples_than_there_are(data_dir: Path) -> None:
    sentence = "piqa has 5 examples to show and --num-fewshot asks for 6"
    with pytest.raises(UserError, match=sentence), load_tasks(["piqa"], data_dir, 6):
        pass
