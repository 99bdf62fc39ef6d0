"""Evaluation while a run trains: scores of `sepllm evaluate`, training untouched, in every layout, over stops."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sepllm_train.cli.main import main
from sepllm_train.cli.pretrain import pretrain, tasks_of
from sepllm_train.config.schema import Config
from sepllm_train.distributed.launch import ALONE, process_grid
from sepllm_train.evaluation.live import LiveTasks, _figures, undisturbed
from sepllm_train.evaluation.options import EvaluationOptions
from sepllm_train.generation.choice import AttentionChoice
from sepllm_train.training.checkpoint import digests
from sepllm_train.training.run import train
from sepllm_train.training.watchdog import Watchdog
from tests.support.distributed_runner import run_ranks
from tests.support.small_run import SMALL_RUN
from tests.training.resume_worker import STEPS, described, small_run, train_all, train_alone

TASKS = ["lambada", "piqa", "arc_easy"]


@pytest.fixture
def needs_harness() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def handlers() -> Iterator[None]:
    """A run that was stopped ignores what may come after."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def groups(data_dir: Path, **more: Any) -> dict[str, Any]:
    """Groups of a run whose context holds the prompts of TASKS."""
    evaluation = {"tasks": TASKS, "interval": 1, "data_dir": str(data_dir), "batch_size": 4}
    return {"data": {"sequence_length": 256}, "evaluation": evaluation, **more}


def scores(folder: Path) -> dict[int, dict[str, float]]:
    """The scores in metrics.jsonl by step, without their seconds."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        record["step"]: {
            key: value for key, value in record.items() if key.startswith("eval/") and "seconds" not in key
        }
        for record in records
        if "eval/seconds" in record
    }


def of_checkpoint(folder: Path, step: int, data_dir: Path) -> dict[str, float]:
    """The scores of a checkpoint, as `sepllm evaluate` has them."""
    from sepllm_train.evaluation.attention import bind
    from sepllm_train.evaluation.run import evaluate, tokenizer_for
    from sepllm_train.evaluation.stream_model import Opened
    from sepllm_train.hf.export import in_memory
    from sepllm_train.runs.open import open_run

    run = open_run(folder, step)
    opened = Opened(in_memory(run), run.tokenizer, str(folder))
    options = EvaluationOptions(tuple(TASKS), data_dir, batch_size=4)
    results = evaluate(opened, tokenizer_for(opened, None), [bind(opened, AttentionChoice("pattern"))], options)
    return {key: value for result in results for key, value in _figures(result).items()}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_scores_are_those_of_the_checkpoints_and_training_is_untouched(
    needs_harness: None,
    one_thread: None,
    precision: str,
    data_dir: Path,
    sample_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fed: list[float] = []
    monkeypatch.setattr(Watchdog, "allow", lambda self, seconds: fed.append(seconds))
    asked = groups(data_dir, training={"precision": precision})
    plain = train_alone(tmp_path, sample_cache, "plain", **{**asked, "evaluation": {}})
    capsys.readouterr()
    environment, level = dict(os.environ), logging.getLogger().level
    folder = train_alone(tmp_path, sample_cache, "scored", **asked)
    told = capsys.readouterr()
    assert dict(os.environ) == environment and logging.getLogger().level == level
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    found = scores(folder)
    assert list(found) == [1, 2, 3] and found[1] != found[3]
    assert {key.split("/")[1] for key in found[1]} == set(TASKS) and "eval/piqa/acc_norm_stderr" in found[1]
    assert "lambada, 7 documents | piqa, 6 documents" in " ".join(told.out.split())
    assert "evaluation at step 2: lambada perplexity" in told.out and "it/s" not in told.err
    # A forward for each batch, and each text.
    assert len(fed) > 3 * 19
    for step in (1, 3):
        assert found[step] == of_checkpoint(folder, step, data_dir)
    assert described(plain) == described(folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({record["seconds"] for record in records}) == STEPS
    assert all(record["eval/seconds"] > 0 for record in records if "eval/seconds" in record)


class Interrupting(LiveTasks):
    """Tasks whose first evaluation is interrupted by a signal before it begins."""

    sent = False

    def scores(self, run: Any, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().scores(run, stopped)


@pytest.mark.slow
def test_an_evaluation_that_was_left_out_is_made_up_for(
    needs_harness: None, one_thread: None, handlers: None, data_dir: Path, sample_cache: Path, tmp_path: Path
) -> None:
    """A stop in the evaluation of step 2, where nothing else is due, and one in that after the last step."""
    asked = groups(data_dir, training={"checkpoint_interval": 0})
    asked["evaluation"] |= {"tasks": ["piqa"], "interval": 2}

    def run(name: str, tasks: LiveTasks, **evaluation: Any) -> Any:
        config = small_run(str(tmp_path), str(sample_cache), name,
                           **{**asked, "evaluation": asked["evaluation"] | evaluation})  # fmt: skip
        with process_grid(config, ALONE) as device, tasks:
            return train(config, ALONE, device, tasks)

    status = lambda name: json.loads((tmp_path / name / "run.json").read_text())["status"]  # noqa: E731
    stopped = run("stopped", Interrupting())
    assert "stopped the run after step 2 of 3" in str(stopped) and status("stopped") == "interrupted"
    assert scores(tmp_path / "stopped") == {}
    assert run("stopped", LiveTasks()) is None and status("stopped") == "finished"
    last = run("last", Interrupting(), interval=0)
    assert "stopped the run after its last step" in str(last) and status("last") == "interrupted"
    assert run("last", LiveTasks(), interval=0) is None and status("last") == "finished"
    assert run("whole", LiveTasks()) is None
    assert scores(tmp_path / "stopped") == scores(tmp_path / "whole")
    assert scores(tmp_path / "last") == {3: scores(tmp_path / "whole")[3]}
    assert dict(digests(tmp_path / "stopped")) == dict(digests(tmp_path / "whole")) == dict(digests(tmp_path / "last"))


def test_weights_that_are_not_finite_cost_the_scores_alone(
    needs_harness: None, one_thread: None, data_dir: Path, sample_cache: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class Spoiling(LiveTasks):
        def scores(self, run: Any, stopped: Callable[[], bool]) -> dict[str, Any] | None:
            weight = next(run.training.modules[0].parameters())
            kept = weight.detach().clone()
            weight.data.flatten()[0] = torch.nan
            try:
                return super().scores(run, stopped)
            finally:
                weight.data.copy_(kept)

    asked = groups(data_dir)
    asked["evaluation"] |= {"tasks": ["piqa"], "interval": 0}
    config = small_run(str(tmp_path), str(sample_cache), "spoiled", **asked)
    with process_grid(config, ALONE) as device, Spoiling() as tasks:
        assert train(config, ALONE, device, tasks) is None
    told = " ".join(capsys.readouterr().out.split())
    assert "warning: the evaluation at step 3 failed (the weights embedding.word_embeddings.weight have values" in told
    assert scores(tmp_path / "spoiled") == {}


def test_the_process_is_as_before_whatever_libraries_do() -> None:
    import tqdm

    state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),  # noqa: E731
                     dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
                     vars(tqdm.tqdm)["__init__"])  # fmt: skip
    before = state()
    with pytest.raises(KeyError), undisturbed(offline=True):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        os.environ["HF_SOMETHING"] = "1"
        os.environ.pop("PATH")
        torch.set_num_threads(before[4] + 1)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        raise KeyError
    after = state()
    assert after == before


def test_the_keys_of_filters_have_no_comma() -> None:
    metrics = {
        "exact_match,strict-match": {"value": 0.5, "stderr": 0.1},
        "word_perplexity": {"value": 9.0, "stderr": None},
    }
    assert _figures({"task": "gsm8k_cot", "metrics": metrics}) == {
        "eval/gsm8k_cot/exact_match/strict-match": 0.5,
        "eval/gsm8k_cot/exact_match/strict-match_stderr": 0.1,
        "eval/gsm8k_cot/word_perplexity": 9.0,
    }


MISTAKES = {
    "evaluation.tasks=[piqa,hellswag]": "the task 'hellswag' is unknown: choose from arc_challenge",
    "evaluation.tasks=[piqa,piqa]": "evaluation.tasks=['piqa', 'piqa'] names a task twice",
    "evaluation.tasks=[sciq]": "/allenai/sciq/SPLIT.jsonl or .parquet",
    "evaluation.data_dir=nowhere": "evaluation.data_dir nowhere is not a folder",
    "evaluation.interval=-1": "evaluation.interval=-1 must be 0 or more",
    "evaluation.limit=0": "evaluation.limit=0 must be at least 1",
    "attention.sink=learned": "evaluation.tasks cannot be scored with attention.sink=learned",
    "attention.placement=shuffled": "evaluation.tasks cannot be scored with attention.placement=shuffled",
    "model.rotary_fraction=0": "evaluation.tasks scores the model as one of transformers, and model.rotary_fraction=0",
    "evaluation.shots=6": "piqa has 5 examples to show and evaluation.shots asks for 6",
    "data.sequence_length=8": "give fewer examples (evaluation.shots), or let it be cut on the left with "
    "evaluation.truncate=true",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(needs_harness: None, mistake: str, data_dir: Path, sample_cache: Path, tmp_path: Path,
                  capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    asked = ["evaluation.tasks=[piqa]", f"evaluation.data_dir={data_dir}", f"run_root={tmp_path}", "name=wrong"]
    assert main(["pretrain", *SMALL_RUN, f"data.cache={sample_cache}", *asked, mistake]) == 2
    message = capsys.readouterr().err
    assert MISTAKES[mistake] in message and len(message.strip().splitlines()) == 1
    assert not (tmp_path / "wrong").exists()


def test_a_missing_package_is_named(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if "lm_eval" in name else find(name, *more)
    )
    asked = ["evaluation.tasks=[piqa]", f"evaluation.data_dir={data_dir}", f"run_root={tmp_path}"]
    assert main(["pretrain", *SMALL_RUN, *asked]) == 2
    assert "evaluation.tasks needs the package lm_eval, which is not installed" in capsys.readouterr().err


def test_a_dry_run_checks_the_tasks(
    needs_harness: None, data_dir: Path, sample_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(str(tmp_path), str(sample_cache), "dry", **groups(data_dir))
    config.dry_run = True
    pretrain(config)
    assert "evaluation: every 1 steps and at the end" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


def test_without_tasks_there_is_nothing(tmp_path: Path) -> None:
    with tasks_of(Config(run_root=str(tmp_path))) as tasks:
        assert tasks is None


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2, "sequence": True}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "interleaved": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "context": {"parallel": {"context": 2}},
    "sharded": {"parallel": {"sharded_optimizer": True}, "model": {"activation": "swiglu", "norm": "rmsnorm",
                "bias": False, "parallel_residual": False, "rotary_fraction": 1.0, "kv_heads": 2},
                "training": {"precision": "bf16"}},
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.slow
def test_layouts(needs_harness: None, one_thread: None, data_dir: Path, sample_cache: Path, tmp_path: Path) -> None:
    """In two processes, each with a half of the documents; seven of lambada, so that one rank has more."""
    asked = groups(data_dir)
    asked["evaluation"] |= {"interval": 2}
    runs = []
    for name, layout in LAYOUTS.items():
        runs.append({"name": name, **asked, **layout})
        runs.append({"name": f"{name} plain", "data": asked["data"], **layout})
    found, _ = run_ranks(train_all, 2, root=str(tmp_path), cache=str(sample_cache), runs=runs)
    for name in LAYOUTS:
        assert found[name] == found[f"{name} plain"], name
        measured = scores(tmp_path / name)
        assert list(measured) == [2, 3]
        alone = of_checkpoint(tmp_path / name, 3, data_dir)
        assert measured[3].keys() == alone.keys()
        for key, value in alone.items():
            # Perplexities are of other batches, and their errors of other resamples.
            if not key.endswith("perplexity_stderr"):
                exact = key.endswith(("acc", "acc_norm"))
                assert measured[3][key] == pytest.approx(value, rel=0 if exact else 1e-6, abs=0), (name, key)
