"""sepllm evaluate report: rows and columns of the paper's table, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import program

main = program("evaluate report")


def result(task: str, label: str, metrics: dict[str, float], **others: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "task": task,
        "metrics": {name: {"value": value, "stderr": None} for name, value in metrics.items()},
        "documents": 10,
        "documents_there": 10,
        "limit": None,
        "num_fewshot": 0,
        "split": "test",
        "truncated_prompts": 0,
        "ranks": 1,
        "data": {"source": "hub"},
        "attention": {"name": label.split(":")[0], "label": label},
        "model": {"name": "m", "fingerprint": "ab", "dtype": "float32", "tokenizer_sha256": "cd"},
        "attended_share": 0.25,
        "kv_share": 0.125,
        **others,
    }


def write(folder: Path, *results: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    for one in results:
        name = f"{one['task']}.{one['attention']['label'].replace(':', '_')}.json"
        (folder / name).write_text(json.dumps(one))
    return str(folder)


def test_other_tasks_have_columns_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(
        tmp_path / "made",
        result("hellaswag", "pattern", {"acc": 0.25, "acc_norm": 0.31}),
        result("hellaswag", "dense", {"acc": 0.26, "acc_norm": 0.33}, attended_share=1.0, kv_share=1.0),
    )
    main([folder])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| attention | hellaswag acc | hellaswag acc_norm | attended | KV kept |"
    assert lines[2:4] == [
        "| dense | 0.2600 | 0.3300 | 100.00 | 100.00 |",
        "| pattern | 0.2500 | 0.3100 | 25.00 | 12.50 |",
    ]
    assert "means over hellaswag." in lines[5] and not any("Not measured" in line for line in lines)


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(
        tmp_path / "first",
        result("lambada", "pattern", {"perplexity": 30.16, "acc": 0.3318}),
        result("lambada", "dense", {"perplexity": 34.83, "acc": 0.3328}, attended_share=1.0, kv_share=1.0),
        result("arc_easy", "pattern", {"acc": 0.4735, "acc_norm": 0.5}, attended_share=0.5),
    )
    second = write(tmp_path / "second", result("lambada", "pattern", {"perplexity": 1e6, "acc": 0}))
    main([first, second, "--output", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "| model | attention | ARC-e | LAMBADA ppl | LAMBADA acc | attended | KV kept |"
    assert lines[2:5] == [
        f"| {first} | dense | - | 34.83 | 33.28 | 100.00 | 100.00 |",
        f"| {first} | pattern | 47.35 | 30.16 | 33.18 | 25.00 | 12.50 |",
        f"| {second} | pattern | - | 1,000,000.00 | 0.00 | 25.00 | 12.50 |",
    ]
    assert "means over lambada." in text
    assert (
        "Not measured: ARC-c, LogiQA, PIQA, SciQ, WikiText word ppl, GSM8K-CoT flexible, GSM8K-CoT strict, MMLU."
        in text
    )
    main([second])
    assert capsys.readouterr().out.startswith("| attention | LAMBADA ppl | LAMBADA acc | attended | KV kept |")


FILE = {"source": "here", "files": {"test": {"sha256": "ab" * 32}}}


@pytest.mark.parametrize(
    "other, sentence",
    [
        ({"limit": 5}, "results of piqa have a different limit (None and 5)"),
        ({"num_fewshot": 5}, "a different number of examples (0 and 5)"),
        ({"data": FILE}, "a different data (hub and {'test': 'abababab'})"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, other: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write(tmp_path / "a", result("piqa", "dense", {"acc": 0.5})),
               write(tmp_path / "b", result("piqa", "dense", {"acc": 0.5}, **other))]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(folders)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_ranks_matter_where_examples_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a", result("piqa", "dense", {"acc": 0.5}, ranks=2))
    main([one, write(tmp_path / "b", result("piqa", "dense", {"acc": 0.5}))])
    one = write(tmp_path / "a", result("piqa", "dense", {"acc": 0.5}, ranks=2, num_fewshot=5))
    with pytest.raises(SystemExit):
        main([one, write(tmp_path / "b", result("piqa", "dense", {"acc": 0.5}, num_fewshot=5))])
    assert "a different number of ranks (2 and 1)" in capsys.readouterr().err


def other_attention(label: str, window: int) -> dict[str, Any]:
    return {"name": label, "label": label, "pattern": {"windows": [window]}}


def test_a_row_is_of_one_model_and_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = result("piqa", "dense", {})["model"]
    cases = [
        ("model", {"model": {**model, "fingerprint": "ef"}}),
        ("dtype", {"model": {**model, "dtype": "bfloat16"}}),
        ("tokenizer", {"model": {**model, "tokenizer_sha256": "ef"}}),
        ("attention", {"attention": other_attention("pattern", 9)}),
    ]
    for what, other in cases:
        folder = tmp_path / what
        write(
            folder,
            result("arc_easy", "pattern", {"acc": 0.5}, attention=other_attention("pattern", 6)),
            result("piqa", "pattern", {"acc": 0.5}, **{"attention": other_attention("pattern", 6), **other}),
        )
        with pytest.raises(SystemExit) as ended:
            main([str(folder)])
        told = capsys.readouterr().err
        files = f"{folder}/arc_easy.pattern.json and {folder}/piqa.pattern.json"
        assert ended.value.code == 2 and f"{files} are in one folder and differ in the {what}: give" in told
    # Two rows of a folder are of one model as well, and may attend otherwise.
    write(tmp_path / "rows", result("piqa", "dense", {"acc": 0.5}), result("piqa", "pattern", {"acc": 0.5}))
    main([str(tmp_path / "rows")])
    write(tmp_path / "rows", result("piqa", "dense", {"acc": 0.5}, model={**model, "fingerprint": "ef"}))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "rows")])
    assert "differ in the model" in capsys.readouterr().err


def test_shares_that_were_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([write(tmp_path, result("piqa", "dense", {"acc": 0.5}, attended_share=None, kv_share=None))])
    assert "| dense | 50.00 | - | - |" in capsys.readouterr().out


WHOLE = result("piqa", "dense", {"acc": 0.5})
NOT_WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "no attention": (
        {key: value for key, value in WHOLE.items() if key != "attention"},
        "x.json is not a whole result of `sepllm evaluate`: its attention is missing or of another type",
    ),
    "no fingerprint": ({**WHOLE, "model": {"name": "m"}}, "its model.fingerprint is missing or of another type"),
    "documents": ({**WHOLE, "documents": "ten"}, "its documents is missing or of another type"),
    "format": ({**WHOLE, "format": 2}, "x.json is in format 2 and this version reads format 1"),
    "metrics": ({**WHOLE, "metrics": {}}, "x.json holds no metrics: evaluate piqa again"),
    "value": ({**WHOLE, "metrics": {"acc": {"value": "0.5"}}}, "its metrics.'acc' has no value"),
    "entry": ({**WHOLE, "metrics": {"acc": 0.5}}, "its metrics.'acc' has no value"),
    "share": ({**WHOLE, "attended_share": 1e300}, "its attended_share is not between 0 and 1"),
    "truth": ({**WHOLE, "documents": True}, "its documents is missing or of another type"),
    "count": ({**WHOLE, "documents": -1}, "its documents is below 0"),
    "label": ({**WHOLE, "attention": WHOLE["attention"] | {"label": "a\n| b"}}, "its attention.label is no name"),
    "half a character": ({**WHOLE, "model": WHOLE["model"] | {"name": "\ud800"}}, "(half of a character)"),
    "file": (
        {**WHOLE, "data": {"source": "x", "files": {"test": 7}}},
        "its data.files.'test' has no sha256",
    ),
    "digits": ({**WHOLE, "documents": 10**400}, "x.json is not JSON of this kind (a number of 401 digits)"),
    "task": ({**WHOLE, "task": "piqa\n"}, "x.json is of a task or an attention that this version does not know"),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_files_that_are_not_whole_results(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, sentence = NOT_WHOLE[case]
    write(tmp_path, WHOLE)
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_folders_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{tmp_path} holds no results: make them with `sepllm evaluate" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "x.json does not hold a JSON object: give a result of `sepllm evaluate`" in capsys.readouterr().err


def test_a_figure_is_not_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "made", result("lambada", "pattern", {"acc": 0.25}))
    with pytest.raises(SystemExit) as ended:
        main([folder, "--output", str(tmp_path / "table.svg")])
    assert ended.value.code == 2 and "is the table's: name it .md" in capsys.readouterr().err
    assert not (tmp_path / "table.svg").exists()
