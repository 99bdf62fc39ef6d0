"""Fuzz targets: files of tasks, results, runs and exported models, damaged at random.

Each function of TARGETS writes one such file with the Random in the folder and runs its reader. A UserError is the
answer to a damaged file; whatever else is raised is a fault.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.compare.report import build_report
from sepllm_train.compare.variants import read_variants
from sepllm_train.evaluation.report import read_results, table
from sepllm_train.evaluation.stream_report import report
from sepllm_train.evaluation.tasks import TASKS, read_records
from sepllm_train.watch.watch import Watch

# Values that some reader may not expect.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400, 0.5, 1e-320, 1e29, 1e300,
    1e308, -1e308, float("nan"), float("inf"),
    "", "x", "\0", "\ud800", "\n", "\x1b[31m", "/", "..", "a" * 300, "\u2028", "1e5",
    [], [None], [[]], [1, "a"], {}, {"a": {}}, {"": 1}, {"value": None}, {"\ud800": 1.0},
)  # fmt: skip


# Bytes put into the text of a file.
PIECES = (b"", b"\xff", b"\x00", b'"', b"{", b"[" * 200, b"9" * 30, b"e999", b"\n", b"-", b"\xef\xbb\xbf")


def mutated(value: Any, chance: random.Random, share: float) -> Any:
    """The value with about `share` of its parts replaced, left out, doubled or nested."""
    if chance.random() < share:
        return chance.choice((*ODD, value, [value], {"a": value}))
    if isinstance(value, dict):
        kept = {key: mutated(inner, chance, share) for key, inner in value.items() if chance.random() > share / 2}
        if chance.random() < share:
            kept[chance.choice(("extra", "", "a.b", "\ud800", *value))] = chance.choice(ODD)
        return kept
    if isinstance(value, list):
        kept = [mutated(inner, chance, share) for inner in value if chance.random() > share / 2]
        return kept * chance.choice((1, 1, 1, 2)) if chance.random() < share else kept
    return value


def damaged(content: Any, chance: random.Random) -> bytes:
    """JSON of mutated content; sometimes its bytes are damaged as well."""
    text = json.dumps(mutated(content, chance, chance.choice((0.0, 0.02, 0.1))), ensure_ascii=chance.random() < 0.8)
    data = bytearray(text.encode("utf8", "surrogatepass"))
    if chance.random() < 0.3:
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data) + 1)
            piece = chance.choice(
                (b"", b"\xff", b"\x00", b'"', b"{", b"[" * 200, b"9" * 30, b"e999", b"\n", b"-", b"\xef\xbb\xbf")
            )
            data[place : place + chance.choice((0, 1, 5))] = piece
    return bytes(data)


def tasks(chance: random.Random, folder: Path) -> None:
    """A file of a task."""
    name = chance.choice([name for name, task in TASKS.items() if task.convert is not None])
    task = TASKS[name]
    assert task.convert is not None
    record = {"question": "a?", "choices": ["b", "c"], "answer": 1, "text": "a b", "context": "d", "page": "e"}
    if name == "gsm8k_cot":
        record["answer"] = "1 #### 1"
    path = folder / f"task{chance.choice(('.jsonl', '.jsonl', '.jsonl', '.txt'))}"
    path.write_bytes(b"\n".join(damaged(record, chance) for _ in range(chance.randint(0, 3))))
    with contextlib.suppress(UserError):
        for found in read_records(path, task.fields, task.convert):
            json.dumps(found, ensure_ascii=False).encode("utf8")


_RESULT = {
    "format": 1,
    "task": "piqa",
    "metrics": {"acc": {"value": 0.5, "stderr": None}},
    "documents": 10,
    "documents_there": 12,
    "limit": None,
    "num_fewshot": 0,
    "split": "test",
    "truncated_prompts": 1,
    "ranks": 1,
    "data": {"source": "x", "files": {"test": {"path": "y", "sha256": "ab"}}},
    "attention": {"name": "dense", "label": "dense"},
    "model": {"name": "m", "fingerprint": "ab", "dtype": "float32", "tokenizer_sha256": "cd"},
    "attended_share": 0.25,
    "kv_share": 0.125,
}
_STREAM = {
    "cache": "sep",
    "initial": 4,
    "separators": 64,
    "window": 256,
    "capacity": 800,
    "interval": None,
    "positions_used": "cache",
    "fingerprint": "ab",
    "text": {"files": [["a.txt", 3]]},
    "tokens": 128,
    "seconds": 2.5,
    "perplexity": 30.0,
    "mean_length": 17.0,
    "points": [{"tokens": 64, "perplexity": 31.0}, {"tokens": 128, "perplexity": 30.0}],
}


def results(chance: random.Random, folder: Path) -> None:
    """Results of an evaluation, and the table of them."""
    for number in range(2):
        (folder / f"{number}.json").write_bytes(damaged(_RESULT | {"task": ("piqa", "arc_easy")[number]}, chance))
    with contextlib.suppress(UserError):
        table(read_results(folder)).encode("utf8")


def streams(chance: random.Random, folder: Path) -> None:
    """The result of a stream, and the table of it."""
    (folder / "result.json").write_bytes(damaged(_STREAM, chance))
    with contextlib.suppress(UserError):
        report([folder], [64]).encode("utf8")


def _run(chance: random.Random, folder: Path, *, whole: bool = False) -> None:
    """A folder of a run with run.json, metrics.jsonl and config.yaml."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    info = {
        "name": folder.name,
        "status": "finished",
        "steps": 40,
        "parameters": 5,
        "world_size": 1,
        "devices": "CPU",
        "origin": chance.choice((None, ".", "..", "step_00000010", f"{folder}/checkpoints/step_00000010")),
        "identity": {"data.tokens_sha256": {"a": {"sha256": "b"}}, "data.earlier": [{"data": {}}], "model.layers": 2},
        "attention": {"pattern": "sep", "window": 64},
        "comparable": {
            "data": {"corpus": {"sha256": "abc", "weight": 1.0}},
            "tokenizer": "d",
            "vocabulary": 4096,
            "sequence_length": 2048,
            "seed_of_data_order": 1,
        },
    }
    lines = []
    for step in (0, 10, 20, 30, 40):
        spent = {"step": step, "tokens": 1000 * step, "seconds": step / 2}
        counters = spent | {f"flops/{kind}": 4000 * step for kind in ("model", "dense", "paper")}
        measured = {"train/tokens_per_second": 2.0, "train/attended_share": 0.5, "train/mfu": 0.1, "train/lr": 1e-3}
        lines.append(counters | {"train/loss": 6.0 - step / 20, **measured})
        lines.append(counters | {"val/loss": 6.0 - step / 20, "val/bits_per_byte": 1.5, "val/a/loss": 5.0})
    text = b"\n".join(json.dumps(line).encode() if whole else damaged(line, chance) for line in lines)
    (folder / "metrics.jsonl").write_bytes(text + b"\n" * chance.randint(0, 1))
    (folder / "run.json").write_bytes(json.dumps(info).encode() if whole else damaged(info, chance))
    config = {"seed": 1, "name": folder.name, "optim": {"lr": 1e-3}, "attention": {"pattern": folder.name}}
    (folder / "config.yaml").write_bytes(json.dumps(config).encode() if whole else damaged(config, chance))


def watch(chance: random.Random, folder: Path) -> None:
    """The live page of a good run and a damaged one: the good one stays."""
    _run(chance, folder / "good", whole=True)
    _run(chance, folder / "bad")
    watching = Watch([folder / "good", folder / "bad"])
    watching._loading = False
    for _ in range(2):
        watching.refresh()
        for scale in ("linear", "log"):
            _, state = watching.state(scale, "")
            header = json.loads(state[4 : 4 + int.from_bytes(state[:4], "little")])
            assert header["runs"][0]["step"] == 40
            # As a browser draws them.
            assert header["runs"][0]["curves"]["loss"] == 5
        _run(chance, folder / "bad")


def compare(chance: random.Random, folder: Path) -> None:
    """The comparison of a good run and two damaged ones."""
    _run(chance, folder / "good", whole=True)
    for name in ("bad", "other"):
        _run(chance, folder / name)
    with contextlib.suppress(UserError):
        variants = read_variants([folder / name for name in ("good", "bad", "other")], warn=lambda sentence: None)
        made = build_report(variants)
        made.console().encode("utf8")
        json.dumps(made.data(), allow_nan=False)
        made.markdown().encode("utf8")


_PATTERN = {
    "format": 1,
    "windows": [8, None],
    "initial_tokens": 1,
    "tiers": [{"horizon": None, "tokens": [3, 7]}, {"horizon": 20, "tokens": [5]}],
    "interval": None,
    "end_of_document": 1,
    "vocabulary": 64,
}


def exported(chance: random.Random, folder: Path) -> None:
    """config.json of an exported model, and its pattern in use."""
    import torch

    from sepllm_train.hf.architecture import read_theirs, to_ours
    from sepllm_train.hf.separators import trained_pattern

    config = {
        "model_type": chance.choice(("llama", "gpt_neox", "qwen3", "mistral")),
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_implementation": "sepllm",
        "sepllm_attention": _PATTERN,
    }
    (folder / "config.json").write_bytes(damaged(config, chance))
    with contextlib.suppress(UserError):
        theirs = read_theirs(folder)
        to_ours(theirs, "name")
        try:
            pattern = trained_pattern(theirs)
        except ValueError:
            return
        if pattern is not None and len(pattern.tier_of_token) > 4 and 1 <= len(pattern.horizons) <= 4:
            pattern.plan(torch.tensor([[1, 2, 3, 4]]))
            pattern.to_dict()


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "tasks": tasks,
    "results": results,
    "streams": streams,
    "watch": watch,
    "compare": compare,
    "exported": exported,
}
