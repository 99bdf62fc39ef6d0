"""Any task of lm-evaluation-harness by its name: local data in the hub's own fields, groups, tags, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

import datasets
from lm_eval.api.instance import Instance

from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.attention import bind
from sepllm_train.evaluation.catalogue import data_sets, definitions, harness_tasks, needed
from sepllm_train.evaluation.harness import SeparatorLM
from sepllm_train.evaluation.loading import load_tasks
from sepllm_train.evaluation.run import EvaluationOptions, evaluate, tokenizer_for
from sepllm_train.evaluation.stream_model import open_model
from sepllm_train.evaluation.tasks import check_data, check_names
from sepllm_train.generation.choice import AttentionChoice
from tests.evaluation.conftest import words, write_lines
from tests.support.command import program

ATTENTIONS = [
    AttentionChoice(),
    AttentionChoice("dense"),
    AttentionChoice("streaming", window=9, label="streaming"),
    AttentionChoice("fixed", interval=5),
    AttentionChoice("cache", separators=4, capacity=20),
]


class Case(NamedTuple):
    """Where the files of a task are, one record of its data set on the hub, the request that it becomes, its metric."""

    folder: str
    split: str
    record: dict[str, Any]
    request: tuple[str, str]
    metric: str


RECALL = {"text": "the cat is home.\nplace: ", "value": "home"}
CASES = {
    "hellaswag": Case(
        "Rowan/hellaswag", "validation",
        {"activity_label": "Cat", "ctx_a": "the cat went", "ctx_b": "it", "label": "1",
         "endings": ["out [title] home.", "out.", "up.", "in."]},
        ("Cat: the cat went It", " out. home."), "acc_norm",
    ),
    "winogrande": Case(
        "allenai/winogrande/winogrande_xl", "validation",
        {"sentence": "the cat met a dog and _ went home.", "option1": "it", "option2": "they", "answer": "2"},
        ("the cat met a dog and it", " went home."), "acc",
    ),
    "boolq": Case(
        "aps/super_glue/boolq", "validation",
        {"passage": "the cat went home", "question": "did the cat go home", "label": 1, "idx": 0},
        ("the cat went home\nQuestion: did the cat go home?\nAnswer:", " no"), "acc",
    ),
    "social_iqa": Case(
        "lighteval/siqa", "validation",
        {"context": "the cat went home.", "question": "who?", "answerA": "a dog", "answerB": "the cat",
         "answerC": "they", "label": "2"},
        ("Q: the cat went home. who?\nA:", " a dog"), "acc",
    ),
    "blimp_wh_island": Case(
        "nyu-mll/blimp/wh_island", "train", {"sentence_good": "the cat went", "sentence_bad": "the went cat"},
        ("", " the cat went"), "acc",
    ),
    "wsc": Case(
        "aps/super_glue/wsc.fixed", "validation",
        {"text": "the cat met a dog and it went home", "span1_index": 1, "span2_index": 6, "span1_text": "cat",
         "span2_text": "it", "label": 0, "idx": 0},
        ('Passage: the cat met a dog and *it* went home\nQuestion: In the passage above, does the pronoun "*it*" refer '
         'to "*cat*"?\nAnswer:', " no"), "acc",
    ),
    "wsc273": Case(
        "lighteval/winograd_wsc/wsc273", "test",
        {"text": "the cat met a dog and it went home", "pronoun": "it", "pronoun_loc": 22, "label": 0,
         "options": ["the cat", "a dog"]},
        ("the cat met a dog and the cat", "  went home"), "acc",
    ),
    "swde": Case("hazyresearch/based-swde-v2", "validation", RECALL, ("the cat is home.\nplace:", ""), "contains"),
    "fda": Case("hazyresearch/based-fda", "validation", RECALL, ("the cat is home.\nplace:", ""), "contains"),
    "squad_completion": Case(
        "hazyresearch/based-squad", "validation", RECALL, ("the cat is home.\nplace:", ""), "contains"
    ),
    "babilong_qa1": Case(
        "RMT-team/babilong-1k-samples/0k", "qa1",
        {"input": "the cat went home.", "question": "where is it?", "target": "home"}, ("", ""), "acc",
    ),
    "longbench_2wikimqa": Case(
        "Xnhyacinth/LongBench/2wikimqa", "test",
        {"context": "the cat went home", "question": "where", "answers": ["home"]}, ("", ""), "qa_f1_score",
    ),
    "openbookqa": Case(
        "allenai/openbookqa/main", "test",
        {"question_stem": "the cat went", "choices": {"text": ["home", "out"], "label": ["A", "B"]}, "answerKey": "A"},
        ("the cat went", " home"), "acc_norm",
    ),
    "sciq": Case(
        "allenai/sciq", "test",
        {"question": "who?", "support": "the cat went", "distractor1": "a dog", "distractor2": "they",
         "distractor3": "we", "correct_answer": "the cat"},
        ("the cat went\nQuestion: who?\nAnswer:", " a dog"), "acc",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_local_files_in_the_hub_s_fields(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Each kind of request, under every attention."""
    if name.startswith("longbench"):
        for package in ("jieba", "fuzzywuzzy", "rouge"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    case = CASES[name]
    write_lines(tmp_path / case.folder / f"{case.split}.jsonl", [case.record, case.record])
    check_data([name], tmp_path)
    with load_tasks([name], tmp_path, None) as (task,):
        (one,) = task.tasks["tasks"].values()
        one.build_all_requests()
        made = one.instances[0].args
        assert made[0] == case.request[0] if case.request[0] else case.record.get("question", "") in made[0]
        assert made[1] == case.request[1] if isinstance(made[1], str) else made[1]["max_gen_toks"] > 0
    model = open_model(str(models["sep"]), None, "fp32", "cpu")
    results = evaluate(
        model, tokenizer_for(model, None), [bind(model, one) for one in ATTENTIONS],
        EvaluationOptions((name,), tmp_path), tmp_path / "made",
    )  # fmt: skip
    assert len(results) == len(ATTENTIONS)
    for result in results:
        assert 0 <= result["metrics"][case.metric]["value"] <= 1 and result["documents"] == 2
        assert result["harness_task"] == name and result["split"] == case.split
        (file,) = result["data"]["files"]
        assert file == f"{case.folder}/{case.split}.jsonl"


@pytest.fixture
def blimp(tmp_path: Path) -> Path:
    """Data of all of BLiMP, two records a task."""
    for task, (path, configuration) in data_sets("blimp").items():
        number = len(task)
        record = {"sentence_good": words(number, 5), "sentence_bad": words(number + 1, 5)}
        write_lines(tmp_path / path / str(configuration) / "train.jsonl", [record, record])
    return tmp_path


@pytest.mark.slow
def test_a_group_has_the_score_of_its_aggregate(models: dict[str, Path], blimp: Path) -> None:
    model = open_model(str(models["sep"]), None, "fp32", "cpu")
    options = EvaluationOptions(("blimp",), blimp, shots=3)
    (result,) = evaluate(model, tokenizer_for(model, None), [bind(model, AttentionChoice())], options)
    scores = [entry["acc"]["value"] for entry in result["subtasks"].values()]
    assert len(scores) == 67 and result["documents"] == 134
    assert result["metrics"]["acc"]["value"] == pytest.approx(sum(scores) / 67) and 0 < sum(scores) < 67
    # Its own number of examples is 0, which the harness does not let anyone change.
    assert result["num_fewshot"] == 0


def test_a_tag_becomes_its_tasks(tmp_path: Path) -> None:
    """Which may not be named beside it."""
    record = {"question": "who?", "choices": {"text": ["a dog", "it"], "label": ["A", "B"]}, "answerKey": "B"}
    for name in ("ARC-Easy", "ARC-Challenge"):
        write_lines(tmp_path / "allenai__ai2_arc" / name / "test.jsonl", [record])
    with load_tasks(["ai2_arc"], tmp_path, None) as loaded:
        assert sorted(task.name for task in loaded) == sorted(needed("ai2_arc")) == ["arc_challenge", "arc_easy"]
        assert all(list(task.tasks["tasks"]) == [task.name] for task in loaded)
    with pytest.raises(UserError, match="names arc_easy twice"), load_tasks(["ai2_arc", "arc_easy"], tmp_path, None):
        pass


def test_parquet_and_a_copy_of_a_repository(tmp_path: Path) -> None:
    record = CASES["openbookqa"].record
    rows = datasets.Dataset.from_list([record, record, record])
    plain, copy = tmp_path / "plain/allenai__openbookqa/main", tmp_path / "copy/allenai/openbookqa"
    (copy / "data").mkdir(parents=True)
    plain.mkdir(parents=True)
    rows.to_parquet(str(plain / "test.parquet"))
    rows.to_parquet(str(copy / "data/test-00000-of-00001.parquet"))
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: data/test-*\n"
        "  - split: validation\n    path: data/test-*\n  - split: train\n    path: data/test-*\n---\n"
    )
    for place in ("plain", "copy"):
        with load_tasks(["openbookqa"], tmp_path / place, None) as (task,):
            (one,) = task.tasks["tasks"].values()
            assert len(one.eval_docs) == 3 and one.eval_docs[0]["question_stem"] == "the cat went"
            (file,) = task.data["files"].values()
            assert Path(file["path"]).suffix == ".parquet" and len(file["sha256"]) == 64


def test_all_examples_of_another_split_may_be_shown(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_lines(tmp_path / f"Rowan/hellaswag/{split}.jsonl", [CASES["hellaswag"].record] * 2)
    with load_tasks(["hellaswag"], tmp_path, 2) as (task,):
        assert task.shots == 2


GOOD = json.dumps(CASES["hellaswag"].record)
MISTAKES: dict[str, tuple[str, dict[str, str], str]] = {
    "no folder": (
        "hellaswag", {}, r"hellaswag needs .*/Rowan/hellaswag/SPLIT.jsonl or .parquet \(SPLIT: train, validation, t"
    ),
    "no configuration": (
        "winogrande", {"allenai/winogrande/validation.jsonl": "{}"}, "needs .*/allenai/winogrande/winogrande_xl/SPLIT"
    ),
    "no file": (
        "hellaswag", {"Rowan/hellaswag/notes.txt": ""}, "Rowan/hellaswag/test.jsonl or .parquet, and it is not there"
    ),
    "another split": (
        "hellaswag", {"Rowan/hellaswag/train.jsonl": GOOD}, "hellaswag has no documents in the split .* evaluated on"
    ),
    "no field": (
        "hellaswag", {"Rowan/hellaswag/validation.jsonl": '{"ctx": "a"}'}, r"hellaswag cannot be loaded \(KeyError"
    ),
    "not JSON": ("hellaswag", {"Rowan/hellaswag/validation.jsonl": "{"}, "validation.jsonl line 1 is not JSON"),
    "empty": ("hellaswag", {"Rowan/hellaswag/validation.jsonl": "\n"}, "validation.jsonl is empty"),
    "mixed": (
        "hellaswag", {"Rowan/hellaswag/validation.jsonl": '{"a": 1}\n{"a": "b"}'}, "cannot be read as a data set"
    ),
    "field of some": (
        "hellaswag", {"Rowan/hellaswag/validation.jsonl": GOOD + '\n{"ctx": "a"}'},
        "line 2 of .*validation.jsonl and its first line do not both have 'activity_label'",
    ),
    "not Parquet": ("hellaswag", {"Rowan/hellaswag/validation.parquet": "x"}, "cannot be read as a data set"),
    "split of its own": (
        "babilong_qa1", {"RMT-team/babilong-1k-samples/0k/qa2.jsonl": "{}"}, "0k/qa1.jsonl or .parquet, and it is not"
    ),
    "part of a group": ("blimp", {}, "blimp_[a-z_]+ needs .*/nyu-mll/blimp/"),
    "examples": (
        "hellaswag", {"Rowan/hellaswag/validation.jsonl": GOOD},
        "hellaswag has 0 examples to show and --num-fewshot asks for 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_local_files(mistake: str, tmp_path: Path) -> None:
    name, files, sentence = MISTAKES[mistake]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    shots = 2 if mistake == "examples" else None
    with pytest.raises(UserError, match=sentence), load_tasks([name], tmp_path, shots):
        pass


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([1, 7], "a record of boolq cannot be used, its label 7 is none of its 2 choices"),
        (["yes", "maybe"], "a record of boolq cannot be used, its label 'maybe' is none of its 2 choices"),
        ([1, None], "a record of boolq cannot be used"),
    ],
)
def test_records_that_would_be_scored_wrongly(
    labels: list[Any], sentence: str, models: dict[str, Path], tmp_path: Path
) -> None:
    case = CASES["boolq"]
    write_lines(tmp_path / case.folder / "validation.jsonl", [case.record | {"label": label} for label in labels])
    model = open_model(str(models["sep"]), None, "fp32", "cpu")
    for truncate in (False, True):
        options = EvaluationOptions(("boolq",), tmp_path, truncate=truncate)
        with pytest.raises(UserError, match=sentence):
            evaluate(model, tokenizer_for(model, None), [bind(model, AttentionChoice())], options, tmp_path / "made")
        assert not (tmp_path / "made").exists()


def test_answers_that_leave_no_room(models: dict[str, Path]) -> None:
    model = open_model(str(models["sep"]), None, "fp32", "cpu")
    lm = SeparatorLM(model.model, tokenizer_for(model, None), batch_size=1, truncate=True)
    request = Instance("generate_until", {}, ("the cat", {"max_gen_toks": lm.max_length}), 0, ("gsm8k", 0, 1))
    with pytest.raises(UserError, match="answers of gsm8k may have .* tokens, which leaves no room"):
        lm.check("gsm8k", [request])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("hellswag", "the task 'hellswag' is unknown: choose from arc_challenge, .*; nearest: hellaswag, "),
        ("niah_single", "the task 'niah_single' is unknown: .*; nearest: .*niah_single_"),
        ("humaneval", "the task humaneval runs code that the model writes"),
        ("pisa", "the task pisa[a-z_]* of pisa shows images|the task pisa.* is unknown"),
        ("pisa_en_llm_judged", "pisa_en_llm_judged (shows images|is judged by another language model)"),
    ],
)
def test_tasks_that_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_names([name])


@pytest.mark.parametrize("part", ["super_glue", "mmlu/default", "scrolls", "arc", "blimp"])
def test_names_are_those_of_the_harness(part: str) -> None:
    """All that its own index finds in a folder, whose files have quoted keys, classes, tags and groups."""
    from lm_eval.tasks import TaskManager

    folder = harness_tasks()
    assert folder is not None
    folder /= part
    theirs = TaskManager(include_path=str(folder), include_defaults=False)
    own = {name for name, paths in definitions().items() if any(path.is_relative_to(folder) for path in paths)}
    assert own == set(theirs.all_tasks) and len(own) > 2
    for tag in theirs.all_tags:
        assert {name for name, path in needed(tag).items() if path.is_relative_to(folder)} == theirs.task_index[
            tag
        ].tags


def test_a_group_stands_for_its_tasks() -> None:
    """Also through a group and a tag in it."""
    assert len(needed("mmlu")) == 57 + 5 and "mmlu_anatomy" in needed("mmlu") and "mmlu_stem" in needed("mmlu")
    assert data_sets("mmlu")["mmlu_anatomy"] == ("cais/mmlu", "anatomy") and len(data_sets("mmlu")) == 57


def test_data_that_the_hub_does_not_give() -> None:
    sentence = (
        r"the data of hellaswag cannot be loaded \(Rowan/hellaswag: .*\): give local files with --data-dir DIR, as "
        r"DIR/Rowan/hellaswag/SPLIT"
    )
    with pytest.raises(UserError, match=sentence), load_tasks(["hellaswag"], None, None):
        pass


def test_names_are_checked_before_torch_is_imported(tmp_path: Path) -> None:
    """Unknown ones, and data that is missing."""
    code = (
        "import sys\nfrom sepllm_train.cli.evaluate import main\n"
        "try:\n    main(sys.argv[1:])\nexcept ValueError as error:\n    print(error)\n"
        "assert not {'torch', 'transformers', 'datasets', 'lm_eval'} & set(sys.modules)"
    )
    for asked, sentence in (
        (["--tasks", "hellaswagg"], "unknown"),
        (["--tasks", "blimp", "--data-dir", str(tmp_path)], "and the folder is not there"),
    ):
        done = subprocess.run([sys.executable, "-c", code, "model", *asked], capture_output=True, text=True, check=True)
        assert sentence in done.stdout


def test_the_command(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result that can be read again, beside one of a paper's task."""
    case = CASES["boolq"]
    write_lines(tmp_path / case.folder / "validation.jsonl", [case.record] * 3)
    write_lines(tmp_path / "openbookqa_test.jsonl", [{"question": "the cat", "choices": ["a", "b"], "answer": 0}])
    for _ in range(2):
        program("evaluate")([models["sep"], "--tasks", "boolq,openbookqa", "--data-dir", tmp_path, "--limit", 2,
                             "--output", tmp_path / "made"])  # fmt: skip
        told = capsys.readouterr().out
        assert "boolq | pattern | acc " in told and "Not measured" not in told
    result = json.loads((tmp_path / "made/boolq.pattern.json").read_text())
    assert result["documents"] == 2 and result["documents_there"] == 3
