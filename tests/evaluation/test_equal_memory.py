"""Loss and needles after a prompt of which some keys are kept: the measurement, its two programs and their report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.equal_memory import (
    NeedlePrompt,
    PromptMemory,
    book_windows,
    continuation_losses,
    needle_scores,
    read_needles,
    separator_scores,
)
from tests.evaluation.conftest import words
from tests.support.command import program

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from sepllm_train.hf import cache_argument  # noqa: E402

PROMPT, TOKENS, KEYS, INITIAL, SEPARATORS = 48, 6, 16, 2, 4
WINDOW = KEYS - INITIAL - SEPARATORS
report = program("evaluate report")


@pytest.fixture(scope="module")
def folders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama with a tokenizer: `dense`, and `sep` that was trained (it says) with separators; `text`."""
    from sepllm_train.hf.separators import CONFIG_KEY, make_pattern
    from sepllm_train.hf.tokenizer import save_tokenizer
    from tests.hf.tiny_models import tiny

    root = tmp_path_factory.mktemp("equal_memory")
    tokenizer = load_tokenizer(models["dense"] / "tokenizer.json")
    model = tiny("llama", vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    for name in ("dense", "sep"):
        if name == "sep":
            pattern = make_pattern(model, window=6, initial=3, tokenizer=tokenizer)
            setattr(model.config, CONFIG_KEY, pattern.to_dict())
        model.save_pretrained(root / name)
        assert save_tokenizer(tokenizer, root / name) is None
    books = [{"text": f"{words(number, 400)}\n{words(number + 9, 600)}"} for number in range(3)]
    (root / "books.jsonl").write_text("".join(json.dumps(book) + "\n" for book in books))
    lines = [
        {
            "task": "niah_single_1",
            "input": f"{words(number, 12)}\n{words(number, 30)}\nwhat is the answer?",
            "gen_prefix": "The answer is",
            "outputs": ["cat"],
            "max_length": 200,
        }
        for number in range(2)
    ]
    (root / "needles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"dense": root / "dense", "sep": root / "sep", "text": root / "books.jsonl", "root": root}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> tuple[Any, Tokenizer]:
    from sepllm_train.hf import load_model

    return load_model(folders["dense"]), load_tokenizer(folders["dense"] / "tokenizer.json")


def separators_of(tokenizer: Tokenizer, ids: Tensor) -> Tensor:
    from sepllm_train.generation.pattern import separator_ids

    return torch.isin(ids, torch.tensor(separator_ids(tokenizer)))


def length_of(cache: Any) -> float:
    return float(cache.layers[0].keys.shape[2])


def pruned(model: Any, tokenizer: Tokenizer) -> PromptMemory:
    """What KVPress with SepLLM's press is to do, in a few lines: keys of the prompt that the scores name stay."""
    caches: list[Any] = []

    def new_cache() -> Any:
        caches.append(transformers.DynamicCache())
        return caches[-1]

    memory = PromptMemory("pruned", "test", KEYS, {}, model, new_cache, length_of, argument=cache_argument(model))

    @contextmanager
    def reading(length: int) -> Iterator[None]:
        seen: list[Tensor] = []

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["input_ids"])

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        yield
        hook.remove()
        scores = separator_scores(separators_of(tokenizer, seen[0]), INITIAL, WINDOW)
        kept = scores.topk(KEYS).indices[:, None, :, None]
        for layer in caches[-1].layers:
            chosen = kept.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, chosen), layer.values.gather(2, chosen)

    memory.reading = reading
    return memory


def test_the_keys_that_separators_keep() -> None:
    is_separator = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]).bool()
    scores = separator_scores(is_separator, initial=1, window=3)

    def kept(count: int) -> list[list[int]]:
        return scores.topk(count).indices.sort().values.tolist()

    # The newest separators first, then the newest others.
    assert kept(4) == [[0, 9, 10, 11], [0, 9, 10, 11]]
    assert kept(6) == [[0, 5, 8, 9, 10, 11], [0, 5, 8, 9, 10, 11]]
    assert kept(9) == [[0, 1, 3, 5, 7, 8, 9, 10, 11], [0, 4, 5, 6, 7, 8, 9, 10, 11]]
    with pytest.raises(ValueError, match="a prompt of 12 tokens is shorter than initial=4"):
        separator_scores(is_separator, initial=4, window=9)


def test_losses_are_those_of_a_mask(opened: tuple[Any, Tokenizer], folders: dict[str, Path]) -> None:
    """Tokens after the prompt see what was kept of it, and one another, at the places of the text."""
    model, tokenizer = opened
    windows, _ = book_windows([folders["text"]], tokenizer, PROMPT + TOKENS + 1, 3, unwrap=False)
    measured = continuation_losses(pruned(model, tokenizer), windows, PROMPT, batch=2)
    mask = torch.ones(PROMPT + TOKENS, PROMPT + TOKENS, dtype=torch.bool).tril().repeat(3, 1, 1)
    kept = separator_scores(separators_of(tokenizer, windows[:, :PROMPT]), INITIAL, WINDOW).topk(KEYS).indices
    mask[:, PROMPT:, :PROMPT] = F.one_hot(kept, PROMPT).sum(1).bool()[:, None]
    with torch.no_grad():
        logits = model(windows[:, :-1], attention_mask=mask[:, None]).logits[:, PROMPT:]
    losses = F.cross_entropy(logits.transpose(1, 2), windows[:, PROMPT + 1 :], reduction="none")
    torch.testing.assert_close(measured.values.float(), losses, atol=1e-5, rtol=0)
    assert measured.keys_at_prompt_end == KEYS and measured.mean_keys == KEYS + (TOKENS + 1) / 2
    # It matters what is seen.
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits[:, PROMPT:]
    whole = F.cross_entropy(logits.transpose(1, 2), windows[:, PROMPT + 1 :], reduction="none")
    assert float((whole - losses).abs().max()) > 1e-2


def test_windows_are_the_middles_of_documents(opened: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    _, tokenizer = opened
    path = tmp_path / "books.jsonl"
    texts = ["\n".join(f"line {start + number}" for number in range(100)) for start in (1000, 3000, 5000)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["too short", *texts]))
    windows, digest = book_windows([path], tokenizer, 50, 2, unwrap=False)
    other, other_digest = book_windows([path], tokenizer, 50, 9, unwrap=False)
    assert windows.shape == (2, 50) and other.shape == (3, 50) and torch.equal(windows, other[:2])
    assert digest != other_digest
    assert tokenizer.decode(other[2].tolist()).startswith("line 5050\nline 5051\n")
    with pytest.raises(UserError, match="books.jsonl: 0 documents have 100,000 tokens in their second half"):
        book_windows([path], tokenizer, 100_000, 2, unwrap=False)


def test_needles_in_the_answer(opened: tuple[Any, Tokenizer], folders: dict[str, Path]) -> None:
    """The answer is the model's own greedy one; what it names counts as found."""
    model, tokenizer = opened
    (group,) = read_needles(folders["root"] / "needles.jsonl", None).values()
    full = PromptMemory("full", "test", None, {}, model, transformers.DynamicCache, length_of)
    full.argument = cache_argument(model)
    record = group[0]
    ids = tokenizer.encode_batch([f"{record['input']} {record['gen_prefix']}"])
    with torch.no_grad():
        generated = model.generate(torch.tensor(ids), max_new_tokens=12, do_sample=False, use_cache=False)
    answer = tokenizer.decode(generated[0, len(ids[0]) :].tolist())
    part = answer[3:7].upper()
    task = NeedlePrompt.of({**record, "outputs": [part, "no such words"]}, tokenizer)
    assert task.context + task.question == ids[0]
    assert tokenizer.decode(task.context) == record["input"].rpartition("\n")[0]
    measured = needle_scores(full, tokenizer, [task, NeedlePrompt.of({**record, "outputs": [part]}, tokenizer)], 12)
    assert measured.values.tolist() == [[0.5], [1.0]]
    assert measured.keys_at_prompt_end == len(task.context)
    assert measured.mean_keys == pytest.approx((len(task.context) + 1 + len(ids[0]) + 12) / 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"input": "a\nb", "gen_prefix": "c", "outputs": [], "max_length": 9}, "line 1 has no outputs"),
        ({"input": "a\nb", "outputs": ["1"], "max_length": 9}, "line 1 has no gen_prefix"),
        (None, "holds no records"),
    ],
)
def test_bad_needles_are_one_sentence(tmp_path: Path, line: dict[str, Any] | None, message: str) -> None:
    path = tmp_path / "needles.jsonl"
    path.write_text("" if line is None else json.dumps(line))
    with pytest.raises(UserError, match=f"{message}.*sepllm evaluate needles"):
        read_needles(path, None)


def options(folders: dict[str, Path], model: str, output: Path, *more: object) -> list[str]:
    given = ["--text", folders["text"], "--prompt", PROMPT, "--tokens", TOKENS, "--windows", 3, "--keys", KEYS]
    given += ["--needles", folders["root"] / "needles.jsonl", "--answer-tokens", 5, "--initial", INITIAL]
    return [str(one) for one in (folders[model], *given, "--output", output, *more)]


def caches(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    from benchmarks.equal_memory.caches import main

    monkeypatch.setattr(sys, "argv", ["caches", *arguments])
    main()


@pytest.fixture(scope="module")
def measured(folders: dict[str, Path]) -> Path:
    """Results of this project's caches with both models."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for model in ("dense", "sep"):
            caches(monkeypatch, options(folders, model, folders["root"] / "results" / model))
    return folders["root"] / "results"


def load(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def test_results_of_the_caches(measured: Path) -> None:
    names = sorted(path.name for path in (measured / "sep").iterdir())
    assert [name for name in names if name.endswith("prompt48.json")] == [
        "fixed.16.prompt48.json",
        "full.all.prompt48.json",
        "pattern.all.prompt48.json",
        "sep.16.prompt48.json",
        "streaming.16.prompt48.json",
    ]
    assert not list((measured / "dense").glob("pattern*"))
    full, sep = (load(measured / "dense", f"{name}.prompt48.json") for name in ("full.all", "sep.16"))
    assert full["keys_at_prompt_end"] == PROMPT and full["mean_keys"] == PROMPT + (TOKENS + 1) / 2
    # A prompt this short has not as many separators as there is room for.
    for name, least in (("sep", KEYS - SEPARATORS), ("streaming", KEYS - 1), ("fixed", KEYS - 1)):
        one = load(measured / "dense", f"{name}.16.prompt48.json")
        assert least <= one["keys_at_prompt_end"] <= KEYS and least <= one["mean_keys"] <= KEYS
    assert full["versions"]["transformers"] == transformers.__version__ and full["versions"]["torch"]
    assert full["data"] == sep["data"] and full["model"] == sep["model"] and len(sep["values"]) == 3
    assert sep["value"] == pytest.approx(sum(sep["values"]) / 3, abs=1e-5) and sep["value"] != full["value"]
    # A pattern's keys are those that it shows, not all that its cache still holds.
    pattern = load(measured / "sep", "pattern.all.prompt48.json")
    assert 9 < pattern["keys_at_prompt_end"] < PROMPT and load(measured / "sep", "full.all.prompt48.json") != full


def test_report(measured: Path, tmp_path: Path) -> None:
    report([measured / "dense", measured / "sep", "--output", tmp_path / "table.md"])
    text = (tmp_path / "table.md").read_text()
    losses = text.partition("Needles")[0]
    full, sep = (load(measured / "dense", f"{name}.prompt48.json") for name in ("full.all", "sep.16"))
    assert "Loss (nats per token) after prompts of 48 tokens, 3 sequences:" in text
    changes = [one - other for one, other in zip(sep["values"], full["values"], strict=True)]
    (line,) = (line for line in losses.splitlines() if line.startswith("| dense | SepCache"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "16" and cells[5] == f"{sep['value']:.4f} ± {sep['error']:.4f}"
    assert cells[6].startswith(f"{sum(changes) / 3:+.4f}")
    drawing = (tmp_path / "table.svg").read_text()
    for label in ("SepCache, dense", "PatternCache, sep", "all keys, sep", "prompts of 48 tokens", "niah_single_1"):
        assert label in drawing


def test_what_the_report_refuses(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = load(measured / "dense", "sep.16.prompt48.json")

    def refused(message: str, **changed: Any) -> None:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        (folder / "result.json").write_text(json.dumps({**one, **changed}))
        with pytest.raises(SystemExit) as ended:
            report([measured / "dense", folder])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and message in error and error.count("\n") == 1

    refused("another is of too")
    refused("differ in their texts or tokens", data={**one["data"], "sequences_sha256": "0"})
    refused("differ in their tokenizer", tokenizer_sha256="0")
    refused("is not a whole result of benchmarks/equal_memory (values)", values=None)
    refused("is not a whole result of benchmarks/equal_memory (content)", values=["a"])
    refused("is not a whole result of benchmarks/equal_memory (kind)", kind="other")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--memories", "snapkv"], "--memories snapkv: choose from full, pattern"),
        (["--memories", "full,full"], "--memories must name at least one, and each once"),
        (["--memories", ""], "--memories must name at least one, and each once"),
        (["--keys", "5"], "--keys 5 leaves no local window"),
        (["--tokens", "300"], "pass the model's context of 256"),
        (["--windows", "0"], "--windows 0 must be at least 1"),
        (["--separator-share", "1"], "--separator-share 1.0 must be between 0 and 1"),
    ],
)
def test_mistakes_are_one_sentence(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        caches(monkeypatch, [*options(folders, "dense", tmp_path / "out"), "--initial", "4", *more])


def presses(python: Path | str, repository: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The program for KVPress, in the environment of `python`."""
    command = [str(python), "benchmarks/equal_memory/presses.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=600)


def test_without_kvpress(folders: dict[str, Path], repository: Path, tmp_path: Path) -> None:
    ended = presses(sys.executable, repository, options(folders, "dense", tmp_path))
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "kvpress is not installed" in ended.stderr and "make kvpress-env" in ended.stderr


@pytest.fixture(scope="module")
def kvpress(repository: Path) -> Path:
    """Python of the environment of KVPress."""
    python = repository / ".venv-kvpress" / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no .venv-kvpress: `make kvpress-env` makes it")
    return python


@pytest.mark.slow
def test_presses(
    kvpress: Path,
    folders: dict[str, Path],
    repository: Path,
    opened: tuple[Any, Tokenizer],
    measured: Path,
    tmp_path: Path,
) -> None:
    """KVPress keeps as many keys as it is given, and the press of SepLLM those that its scores name."""
    output = tmp_path / "presses"
    ended = presses(kvpress, repository, options(folders, "dense", output))
    assert ended.returncode == 0, ended.stderr
    full, ours = (load(folder, "full.all.prompt48.json") for folder in (output, measured / "dense"))
    assert full["values"] == pytest.approx(ours["values"], abs=1e-5) and full["data"] == ours["data"]
    assert full["versions"]["kvpress"] and full["versions"]["transformers"] != ours["versions"]["transformers"]
    for name in ("h2o", "snapkv", "pyramidkv", "streamingllm", "tova", "knorm", "random", "sepllm"):
        for measure in ("prompt48", "niah_single_1200"):
            one = load(output, f"{name}.{KEYS}.{measure}.json")
            assert one["keys_at_prompt_end"] == pytest.approx(KEYS, abs=1 if name == "pyramidkv" else 0)
    model, tokenizer = opened
    windows, _ = book_windows([folders["text"]], tokenizer, PROMPT + TOKENS + 1, 3, unwrap=False)
    expected = continuation_losses(pruned(model, tokenizer), windows, PROMPT, batch=3).values.mean(1)
    press = load(output, f"sepllm.{KEYS}.prompt48.json")
    assert press["values"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert press["memory"]["settings"]["window"] == WINDOW
    report([measured / "dense", output, "--output", tmp_path / "table.md"])
    assert "SnapKV, KVPress" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_models_that_presses_refuse(
    kvpress: Path, folders: dict[str, Path], models: dict[str, Path], repository: Path, tmp_path: Path
) -> None:
    others = {"dense": models["dense"], "text": folders["text"], "root": folders["root"]}
    for given, name, message in ((folders, "sep", "trained with separator attention"), (others, "dense", "gpt_neox")):
        ended = presses(kvpress, repository, options(given, name, tmp_path))
        assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
