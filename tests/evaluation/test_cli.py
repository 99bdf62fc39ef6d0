"""evaluate.py from the command line: results, table, several ranks, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from sepllm_train.evaluation import cli, kv_share
from tests.conftest import REPOSITORY
from tests.evaluation.conftest import write_lines

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")


@pytest.fixture
def needs_harness() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


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
    """kv_share.py and the evaluation agree on prompts, separators and counts."""
    run(models["sep"], "--tasks", "gsm8k_cot", "--data-dir", data_dir, "--output", tmp_path, "--window", 20,
        "--batch-size", 2)  # fmt: skip
    (result,) = results(tmp_path).values()
    capsys.readouterr()
    kv_share.main(["--data-dir", str(with_examples(data_dir)), "--tokenizer", str(models["sep"] / "tokenizer.json"),
                   "--window", "20"])  # fmt: skip
    assert capsys.readouterr().out.startswith(f"{result['kv_share_prompt']:.4f} of the keys kept")


def with_examples(data_dir: Path) -> Path:
    """The data with the eight examples of the harness's task in a file."""
    import yaml
    from lm_eval import tasks

    definition = yaml.safe_load((Path(tasks.__file__).parent / "gsm8k/gsm8k-cot.yaml").read_text())
    write_lines(data_dir / "gsm8k/cot_8shot.jsonl", definition["fewshot_config"]["samples"])
    return data_dir


@pytest.mark.distributed
def test_two_ranks_give_the_results_of_one(
    needs_harness: None, models: dict[str, Path], data_dir: Path, tmp_path: Path
) -> None:
    """Five documents, so that one rank has a document more."""
    command = ["scripts/evaluate.py", str(models["sep"]), "--tasks", "logiqa,gsm8k_cot", "--data-dir", str(data_dir),
               "--limit", "5", "--batch-size", "2", "--threads", "1"]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, *command, "--output", str(tmp_path / "two")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run(*command[1:], "--output", tmp_path / "one")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 2
    for name, result in one.items():
        assert two[name]["ranks"] == 2 and two[name]["documents"] == result["documents"]
        for metric, entry in result["metrics"].items():
            assert two[name]["metrics"][metric]["value"] == pytest.approx(entry["value"], rel=1e-6)
        for key in ("sequences", "attended_share", "kv_share", "kv_share_prompt"):
            assert two[name][key] == pytest.approx(result[key])


MISTAKES = {
    "--tasks hellaswag": "the task 'hellaswag' is unknown: choose from arc_challenge, arc_easy, lambada",
    "--tasks ,": "--tasks names no task",
    "--tasks piqa,piqa": "--tasks names a task twice",
    "--tasks sciq": "sciq has no form for local files",
    "--tasks piqa --limit 0": "--limit 0 must be at least 1",
    "--tasks piqa --batch-size 0": "--batch-size 0 must be at least 1",
    "--tasks piqa --num-fewshot -1": "--num-fewshot -1 must be at least 0",
    "--tasks piqa --num-fewshot 6": "piqa has 5 examples to show and --num-fewshot asks for 6",
    "--tasks piqa --window 0": "window=0 must be at least 1",
    "--tasks piqa --baselines h2o": "the baseline 'h2o' is unknown: choose from pattern, dense, streaming",
    "--tasks piqa --baselines fixed": "fixed needs --interval D",
    "--tasks piqa --baselines streaming:window=x": "'window=x' in the baseline streaming:window=x is not KEY=VALUE",
    "--tasks piqa --baselines dense,dense": "the attentions pattern, dense, dense name one twice",
    "--tasks piqa --attention cache": "cache needs --capacity",
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
