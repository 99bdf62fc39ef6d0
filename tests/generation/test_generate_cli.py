"""sepllm generate on a real run: what it prints, in which layouts, and what it says of mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from sepllm_train.base.errors import EXIT_USER_ERROR, UserError
from sepllm_train.distributed.launch import alone
from sepllm_train.runs.open import config_for, open_run, read_config
from tests.generation.native_models import full_logits
from tests.support.command import program
from tests.support.waiting import HANG_SECONDS

main = program("generate")

PROMPTS = ["The quick brown fox, ", "A", "Return a string. The file, which\tis open,"]
Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def records(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> Records:
    """Generates with --json in this process; gives the lines."""

    def generated(*arguments: str) -> list[dict[str, Any]]:
        main([str(trained_run), "--json", *arguments])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return generated


def asked(prompts: list[str]) -> list[str]:
    """Options that give `prompts`."""
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def without_time(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of JSON without how long they took."""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in found]


def test_generated_tokens_are_those_that_the_full_forward_predicts(trained_run: Path, records: Records) -> None:
    (found,) = records("--prompt", PROMPTS[0], "--tokens", "40")
    with alone() as device:
        opened = open_run(trained_run)
        model = opened.load_model(config_for(opened.config, 1, 1), device)
        (prompt,) = opened.tokenizer.encode_batch([PROMPTS[0]])
        ids = list(prompt)
        for _ in range(40):
            ids.append(int(full_logits(model, opened.token_pattern, ids, opened.vocabulary)[-1].argmax()))
    assert found["prompt"] == PROMPTS[0]
    assert PROMPTS[0] + found["text"] == opened.tokenizer.decode(ids)
    assert (found["prompt_tokens"], found["tokens"], found["ended"]) == (len(prompt), 40, False)
    assert found["mean_cache_length"] == (len(prompt) + 40) / 2
    assert found["tokens_per_second"] > 0


def test_a_batch_is_as_its_prompts_alone(records: Records, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in [*PROMPTS[1:], ""]))
    sizes = ["--cache=sep", "--initial=2", "--separators=4", "--window=6", "--capacity=20", "--tokens=30"]
    together = without_time(records(*asked(PROMPTS[:1]), "--prompt-file", str(file), *sizes))
    assert [line["prompt"] for line in together] == [*PROMPTS, ""]
    for prompt, line in zip([*PROMPTS, ""], together, strict=True):
        assert without_time(records("--prompt", prompt, *sizes)) == [line]
        assert line["mean_cache_length"] < 20
    # Without a prompt, the end of another document.
    assert together[-1]["prompt_tokens"] == 1


def test_checkpoint_seed_and_cache_are_what_was_asked_for(records: Records) -> None:
    def text(*arguments: str) -> str:
        return records("--prompt", "The", "--tokens", "30", *arguments)[0]["text"]

    drawn = ("--temperature", "1", "--top-k", "100")
    assert text() == text("--greedy")
    assert text(*drawn, "--seed", "3") == text(*drawn, "--seed", "3")
    assert text(*drawn, "--seed", "3") != text(*drawn, "--seed", "4")
    assert text(*drawn, "--checkpoint", "1") != text(*drawn, "--checkpoint", "2")
    assert text("--top-p", "0.9") != text()
    # Nothing has been dropped or hidden as long as all is in the window.
    few = ("--tokens", "5")
    assert text(*few, "--cache", "full") == text(*few, "--cache", "streaming")


def test_a_single_text_is_printed_as_it_comes(trained_run: Path, records: Records) -> None:
    command = [sys.executable, "-m", "sepllm_train", "generate", str(trained_run)]
    done = _run([*command, "--prompt", PROMPTS[0], "--tokens", "70"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == PROMPTS[0] + records("--prompt", PROMPTS[0], "--tokens", "70")[0]["text"] + "\n"
    cache, warning, end = done.stderr.splitlines()
    assert cache == "cache: pattern | as in training | positions training"
    assert warning.startswith("warning: prompt and new tokens are up to ")
    assert warning.endswith("tokens, beyond the 64 that the model was trained on.")
    assert end.startswith("70 tokens in ")
    assert "keys in the cache on average" in end


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_share_a_model_that_one_has_trained(trained_run: Path, records: Records) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [*asked(PROMPTS), "--tokens", "25", "--temperature", "0.8", "--seed", "5"]
    script = ["-m", "sepllm_train", "generate", str(trained_run), "--tensor", "2", "--json"]
    done = _run([*torchrun, *script, *arguments])
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert without_time(found) == without_time(records(*arguments))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment, check=False)


def test_only_the_tokenizer_of_the_data_is_needed(
    trained_run: Path, sample_prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], records: Records
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained_run, moved)
    config = (moved / "config.yaml").read_text()
    assert "source: sample" in config and "prefixes: []" in config
    gone = config.replace("source: sample", "source: prefixes").replace("prefixes: []", f"prefixes: [{tmp_path}/gone]")
    (moved / "config.yaml").write_text(gone)
    expected = without_time(records("--prompt", "The", "--tokens", "20"))
    arguments = [str(moved), "--json", "--prompt", "The", "--tokens", "20"]
    sentence = _refused(arguments, capsys)
    assert sentence == (
        f"error: the tokenizer of {moved} is not found beside its data ({tmp_path}/gone): give its file with "
        "--tokenizer."
    )
    tokenizer = sample_prefix.with_name("docs.tokenizer.model")
    main([*arguments, "--tokenizer", str(tokenizer)])
    assert without_time([json.loads(capsys.readouterr().out)]) == expected
    shutil.copyfile(tokenizer, moved / "tokenizer.model")
    main(arguments)
    assert without_time([json.loads(capsys.readouterr().out)]) == expected

    other = tmp_path / "other.json"
    words = tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(other))
    sentence = _refused([*arguments, "--tokenizer", str(other)], capsys)
    assert sentence.startswith(f"error: {other} is not the tokenizer that {moved} was trained with")


def test_a_damaged_checkpoint_that_is_skipped_is_told(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], records: Records
) -> None:
    expected = without_time(records("--prompt", "The", "--tokens", "5", "--checkpoint", "1"))
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    shard = run / "checkpoints" / "step_00000002" / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 5)
    main([str(run), "--json", "--prompt", "The", "--tokens", "5"])
    shown = capsys.readouterr()
    assert without_time([json.loads(shown.out)]) == expected
    first = shown.err.splitlines()[0]
    assert first.startswith(f"skipped the damaged checkpoint {shard.parent} ({shard} has ")
    main([str(run), "--json", "--prompt", "The", "--tokens", "5", "--checkpoint", "1"])
    assert "skipped" not in capsys.readouterr().err


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == EXIT_USER_ERROR
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "there is nothing to continue: give --prompt TEXT, or --prompt-file FILE with one a line."),
        ("--prompt-file none.txt", "the prompts none.txt cannot be read: No such file or directory."),
        ("--prompt x --tokens 0", "--tokens 0 must be at least 1."),
        ("--prompt x --checkpoint 9", "has no checkpoint of step 9: there are 1, 2."),
        ("--prompt x --cache lru", "argument --cache: invalid choice: 'lru' (choose from "),
        ("--prompt x --cache sep --capacity 60", "initial=3 + separators=64 + window=8 is 75, and capacity=60 must be"),
        ("--prompt x --window 4", "--window does not apply to pattern: it is for sep, streaming, fixed."),
        ("--prompt x --positions cache", "positions='cache' needs the same capacity in all layers"),
        ("--prompt x --top-p 1.5", "--top-p 1.5 must be above 0 and at most 1."),
        ("--prompt x --greedy --top-k 5", "--top-k and --top-p need a --temperature above 0"),
        ("--prompt x --tokenizer none.model", "Cannot read the tokenizer none.model: No such file or directory."),
        ("--prompt x --pipeline 2", "generation has no pipeline parallelism"),
        (
            "--prompt x --tensor 2",
            "--tensor 2 takes 2 processes and 1 were started: python -m sepllm_train.distributed.torchrun ",
        ),
    ],
)
def test_mistakes_end_with_one_sentence(
    arguments: str, sentence: str, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in _refused([str(trained_run), *arguments.split()], capsys)


def test_a_missing_run_and_wrong_numbers_of_processes_are_refused(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"{tmp_path}/config.yaml does not exist" in _refused([str(tmp_path), "--prompt", "x"], capsys)
    config = read_config(trained_run)
    with pytest.raises(UserError, match="parallel.tensor=3 must divide model.heads=4"):
        config_for(config, 3, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--tensor 1 takes 1 processes and 2 were started" in _refused([str(trained_run), "--prompt", "x"], capsys)
