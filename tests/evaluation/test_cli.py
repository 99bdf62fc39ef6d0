"""sepllm evaluate from the command line: results, table, several ranks, mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.conftest import REPOSITORY
from tests.evaluation.conftest import choice, words, write_lines
from tests.support.command import command, program
from tests.support.waiting import HANG_SECONDS

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")


@pytest.fixture
def needs_harness() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")


def run(*words: object) -> None:
    program("evaluate")(words)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_results(
    needs_harness: None, models: dict[str, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines = "dense,streaming:window=9,fixed:interval=5,cache:capacity=20:separators=4"
    run(models["sep"], "--tasks", "lambada,gsm8k_cot", "--data-dir", data_dir, "--baselines", baselines,
        "--output", tmp_path, "--limit", 2)  # fmt: skip
    found = results(tmp_path)
    labels = ["pattern", "dense", "streaming_window=9", "fixed_interval=5", "cache_capacity=20_separators=4"]
    assert sorted(found) == sorted(f"{task}.{label}" for task in ("lambada", "gsm8k_cot") for label in labels)
    told = capsys.readouterr().out
    for name, result in found.items():
        assert f"{name.split('.')[0]} | {result['attention']['label']} | " in told
        assert f"attended {result['attended_share']:.2%} | KV kept {result['kv_share_prompt']:.2%} at" in told
        assert result["documents"] == result["limit"] == 2 and result["seconds"] > 0
        assert result["versions"].keys() >= {"lm_eval", "transformers"} and result["environment"]["processor"]
        assert len(result["model"]["fingerprint"]) == len(result["data"]["files"]["test"]["sha256"]) == 64
        if "dense" not in name:
            assert 0 < result["kv_share"] < 1 and 0 < result["attended_share"] < 1
            assert result["attention"]["pattern"]["windows"] == ([9, 9] if "window" in name else [6, 6])
    assert found["lambada.pattern"]["metrics"].keys() == {"perplexity", "acc"}
    assert found["gsm8k_cot.pattern"]["metrics"].keys() >= {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert found["gsm8k_cot.pattern"]["num_fewshot"] == 8
    assert found["lambada.pattern"]["attention"]["differences"] == []
    assert found["lambada.streaming_window=9"]["attention"]["differences"] != []
    cache = found["lambada.cache_capacity=20_separators=4"]["attention"]["cache"]
    assert cache == {"window": 6, "initial": 3, "separators": 4, "capacity": 20, "positions": "cache"}
    rows = [row for row in told.splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| dense", "| streaming:window=9", "| fixed:interval=5", "| pattern", "| cache:capacity=20:separators=4"
    ]  # fmt: skip


def test_a_dense_model_takes_the_paper_s_numbers(needs_harness: None, models: dict[str, Path], data_dir: Path,
                                                 tmp_path: Path) -> None:  # fmt: skip
    run(models["dense"], "--tasks", "piqa", "--data-dir", data_dir, "--output", tmp_path, "--num-fewshot", 3)
    attention = results(tmp_path)["piqa.pattern"]["attention"]
    assert attention["pattern"]["windows"] == [256, 256] and attention["pattern"]["initial_tokens"] == 3
    assert attention["differences"] == ["trained with full attention"]


def test_the_kept_share_is_the_one_counted_without_a_model(
    needs_harness: None, models: dict[str, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate kv` and the evaluation agree on prompts, separators and counts."""
    run(models["sep"], "--tasks", "gsm8k_cot", "--data-dir", data_dir, "--output", tmp_path, "--window", 20,
        "--batch-size", 2)  # fmt: skip
    (result,) = results(tmp_path).values()
    capsys.readouterr()
    tokenizer = models["sep"] / "tokenizer.json"
    command("evaluate kv")(["--data-dir", with_examples(data_dir), "--tokenizer", tokenizer, "--window", 20])
    assert capsys.readouterr().out.startswith(f"{result['kv_share_prompt']:.4f} of the keys kept")


def with_examples(data_dir: Path) -> Path:
    """The data with the eight examples of the harness's task in a file."""
    import yaml
    from lm_eval import tasks

    definition = yaml.safe_load((Path(tasks.__file__).parent / "gsm8k/gsm8k-cot.yaml").read_text())
    write_lines(data_dir / "gsm8k/cot_8shot.jsonl", definition["fewshot_config"]["samples"])
    return data_dir


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_give_the_results_of_one(
    needs_harness: None, models: dict[str, Path], data_dir: Path, tmp_path: Path
) -> None:
    """Five documents, so that one rank has a document more."""
    asked = [str(models["sep"]), "--tasks", "logiqa,gsm8k_cot", "--data-dir", str(data_dir)]
    asked += ["--limit", "5", "--batch-size", "2", "--threads", "1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "sepllm_train", "evaluate", *asked, "--output", str(tmp_path / "two")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run(*asked, "--output", tmp_path / "one")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 2
    for name, result in one.items():
        assert two[name]["ranks"] == 2 and two[name]["documents"] == result["documents"]
        for metric, entry in result["metrics"].items():
            assert two[name]["metrics"][metric]["value"] == pytest.approx(entry["value"], rel=1e-6)
        for key in ("sequences", "attended_share", "kv_share", "kv_share_prompt"):
            assert two[name][key] == pytest.approx(result[key])


MISTAKES = {
    "--tasks hellswag": "the task 'hellswag' is unknown: choose from arc_challenge, arc_easy, lambada",
    "--tasks hellaswag": "/Rowan/hellaswag/SPLIT.jsonl or .parquet (SPLIT: train, validation, test)",
    "--tasks ,": "--tasks names no task",
    "--tasks piqa,piqa": "--tasks names a task twice",
    "--tasks sciq": "/allenai/sciq/SPLIT.jsonl or .parquet (SPLIT: train, validation, test)",
    "--tasks piqa --lengths 600": "--lengths is for needles, and --tasks names none of niah_single_1, niah_single_2",
    "--tasks piqa --limit 0": "--limit 0 must be at least 1",
    "--tasks piqa --batch-size 0": "--batch-size 0 must be at least 1",
    "--tasks piqa --num-fewshot -1": "--num-fewshot -1 must be at least 0",
    "--tasks piqa --num-fewshot 6": "piqa has 5 examples to show and --num-fewshot asks for 6",
    "--tasks piqa --window 0": "--window 0 must be at least 1",
    "--tasks piqa --baselines h2o": "the baseline 'h2o' is unknown: choose from pattern, dense, streaming",
    "--tasks piqa --baselines fixed": "fixed needs --interval D",
    "--tasks piqa --baselines streaming:window=x": "'window=x' in the baseline streaming:window=x is not KEY=VALUE",
    "--tasks piqa --baselines dense:window=5": "'window=5' in the baseline dense:window=5 does not apply to dense",
    "--tasks piqa --interval 4": "--interval does not apply to pattern: it is for fixed",
    "--tasks piqa --separators 64 --baselines dense": "--separators does not apply to pattern, dense: it is for cache",
    "--tasks piqa --baselines pattern:classes=comma,period": "classes of a baseline are joined by +, not by commas",
    "--tasks piqa --baselines dense,dense": "the attentions pattern, dense, dense name one twice",
    "--tasks piqa --attention cache --capacity 60": "capacity=60 must be larger: at least 74",
    "--tasks piqa --attention cache --capacity 99999": "capacity=99999 is above the model's context of 4096",
    "--tasks piqa --classes vowels": "Unknown separator class 'vowels'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(
    needs_harness: None, models: dict[str, Path], data_dir: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(models["sep"], "--data-dir", data_dir, *words.split())
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert MISTAKES[words] in errors and errors.count("error: ") == 1 and "Traceback" not in errors


def test_missing_files_are_told_before_the_model_is_opened(
    needs_harness: None, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, sentence in (
        (tmp_path, f"piqa needs {tmp_path}/piqa_validation.jsonl, and it is not there"),
        (tmp_path / "none", f"--data-dir {tmp_path}/none is not a folder"),
        (data_dir, "nothing is neither a run (config.yaml) nor a transformers model"),
    ):
        with pytest.raises(SystemExit):
            run("nothing", "--tasks", "piqa", "--data-dir", folder)
        assert sentence in capsys.readouterr().err


def test_prompts_longer_than_the_context(
    needs_harness: None, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "lambada_openai_test.jsonl", [{"text": "the cat " * 2400 + "went"}])
    with pytest.raises(SystemExit) as ended:
        run(models["sep"], "--tasks", "lambada", "--data-dir", tmp_path)
    assert ended.value.code == 2 and "and the model's context 4,096: give fewer" in capsys.readouterr().err
    run(models["sep"], "--tasks", "lambada", "--data-dir", tmp_path, "--truncate", "--output", tmp_path / "made")
    assert results(tmp_path / "made")["lambada.pattern"]["truncated_prompts"] == 1
    assert "lambada: 0-shot, 1 prompts cut on the left" in capsys.readouterr().out


def test_all_prompts_are_checked_before_the_first_forward(
    needs_harness: None, models: dict[str, Path], data_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A prompt of the last task, and one that does not fit with its answer."""
    from sepllm_train.evaluation.harness import SeparatorLM

    monkeypatch.setattr(SeparatorLM, "_model_call", lambda *_, **__: pytest.fail("a forward ran"))
    write_lines(tmp_path / "lambada_openai_test.jsonl", [{"text": words(0, 20)}])
    write_lines(tmp_path / "piqa_validation.jsonl", [choice(0, 2), {**choice(1, 2), "question": "the cat " * 2400}])
    write_lines(tmp_path / "gsm8k/test.jsonl", [{"question": "the cat " * 1000, "answer": "#### 1"}])
    for last, sentence in (("piqa", "of piqa has"), ("gsm8k_cot", "of gsm8k_cot with its answer has")):
        with pytest.raises(SystemExit) as ended:
            run(models["sep"], "--tasks", f"lambada,{last}", "--data-dir", tmp_path, "--output", tmp_path / "made")
        assert ended.value.code == 2 and f"error: a prompt {sentence} " in capsys.readouterr().err
        assert not (tmp_path / "made").exists()


def test_results_of_other_settings_are_not_overwritten(
    needs_harness: None, models: dict[str, Path], data_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from sepllm_train.evaluation.harness import SeparatorLM

    common = ("--tasks", "piqa", "--data-dir", data_dir, "--output", tmp_path, "--limit", 2)
    run(models["sep"], *common, "--baselines", "cache:capacity=80")
    run(models["sep"], *common, "--baselines", "cache:capacity=80", "--batch-size", 1)
    path = tmp_path / "piqa.pattern.json"
    before = path.read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(SeparatorLM, "_model_call", lambda *_, **__: pytest.fail("a forward ran"))
        for model, others, what in (
            ("dense", ("--window", 6), "model"),
            ("sep", ("--window", 9), "attention"),
            ("sep", ("--limit", 3), "limit"),
            ("sep", ("--num-fewshot", 1), "number of examples"),
            ("sep", ("--dtype", "bf16"), "model"),
        ):
            with pytest.raises(SystemExit) as ended:
                run(models[model], *common, *others)
            told = capsys.readouterr().err
            assert ended.value.code == 2 and f"{path} holds a result with a different {what}: choose another" in told
    assert path.read_bytes() == before
    run(models["sep"], *common, "--window", 9, "--overwrite")
    assert results(tmp_path)["piqa.pattern"]["attention"]["pattern"]["windows"] == [9, 9]


def test_an_output_that_cannot_be_a_folder(
    needs_harness: None, models: dict[str, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        run(models["sep"], "--tasks", "piqa", "--data-dir", data_dir, "--output", tmp_path / "file")
    assert ended.value.code == 2 and f"error: --output {tmp_path}/file cannot be made" in capsys.readouterr().err


def test_a_run_is_evaluated_as_what_is_exported_of_it(
    needs_harness: None, trained_run: Path, exported_run: Path, data_dir: Path, tmp_path: Path
) -> None:
    """With the pattern of training, and the paper's baselines beside it."""
    for name, folder in (("run", trained_run), ("exported", exported_run)):
        run(folder, "--tasks", "lambada,wikitext", "--data-dir", data_dir, "--output", tmp_path / name, "--limit", 2,
            "--baselines", "paper")  # fmt: skip
    own, other = results(tmp_path / "run"), results(tmp_path / "exported")
    labels = ("pattern", "dense", "streaming", "fixed_interval=5")
    assert own.keys() == other.keys() == {f"{task}.{label}" for task in ("lambada", "wikitext") for label in labels}
    for name, result in own.items():
        assert result["metrics"].keys() == other[name]["metrics"].keys()
        for metric, entry in result["metrics"].items():
            assert other[name]["metrics"][metric]["value"] == pytest.approx(entry["value"], rel=1e-5)
        for key in ("attended_share", "kv_share", "sequences", "attention"):
            assert result[key] == other[name][key]
        assert result["model"]["fingerprint"] == other[name]["model"]["fingerprint"]
    attention = own["lambada.pattern"]["attention"]
    assert attention["differences"] == [] and attention["pattern"]["windows"] == [8] * 4
    assert attention["pattern"]["initial_tokens"] == 3
    # A page has several windows of the model's context.
    assert own["wikitext.pattern"]["sequences"] > own["wikitext.pattern"]["documents"] == 2


def test_a_run_with_a_learned_sink_is_refused(
    needs_harness: None, trained_run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert text.count("  sink: none\n") == 1
    config.write_text(text.replace("  sink: none\n", "  sink: learned\n"))
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "run", "--tasks", "piqa", "--data-dir", data_dir)
    assert ended.value.code == 2 and "attention.sink=learned cannot be exported" in capsys.readouterr().err


def test_without_the_harness(
    models: dict[str, Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run", "harness"):  # the modules that import it
        monkeypatch.delitem(sys.modules, f"sepllm_train.evaluation.{name}", raising=False)
    for name in ("lm_eval", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended:
        run(models["sep"], "--tasks", "piqa", "--data-dir", data_dir)
    assert ended.value.code == 2
    told = "error: lm_eval is not installed: pip install -e '.[eval]' in the checkout.\n"
    assert capsys.readouterr().err.endswith(told)
