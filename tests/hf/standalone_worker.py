"""Exported models without this project: a program of torch and transformers alone, which test_standalone.py runs.

    python standalone_worker.py TASKS.pt

Each task is (name of a function below, its arguments); the results take the place of the tasks in the file.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


def load(folder: str | Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def cache_in(output: Any) -> Any:
    return output["cache"] if "cache" in output else output["past_key_values"]


def message(call: Callable[[], Any]) -> str:
    """The error of a call that must fail."""
    try:
        call()
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def logits(folder: str, ids: Tensor, mask: Tensor, pieces: list[int]) -> dict[str, Any]:
    """Logits of a batch at once, in the pieces of a cache, and with greedy tokens with and without one."""
    model = load(folder)
    found = {"class": type(model).__name__, "whole": model(input_ids=ids, attention_mask=mask).logits}
    cache, parts, start, widths = None, [], 0, []
    name = "cache" if "cache" in model(input_ids=ids[:, -1:]) else "past_key_values"
    for size in pieces:
        end = start + size
        output = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **{name: cache})
        cache, start = cache_in(output), end
        parts.append(output.logits)
        widths.append([layer.keys.shape[-2] for layer in cache.layers])
    found |= {"pieces": torch.cat(parts, 1), "widths": widths}
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    found["greedy"] = model.generate(ids, **settings)
    found["uncached"] = model.generate(ids, **settings, use_cache=False)
    return found


def generate(folder: str, ids: Tensor, **settings: Any) -> tuple[Tensor, list[int]]:
    """Tokens, and the keys of each layer in the end."""
    output = load(folder).generate(ids, return_dict_in_generate=True, **settings)
    return output.sequences, [layer.keys.shape[-2] for layer in cache_in(output).layers]


def gradients(folder: str, ids: Tensor, checkpointing: bool) -> Tensor:
    """Gradient of the loss for the embeddings."""
    model = load(folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.enable_grad():
        model(input_ids=ids, labels=ids).loss.backward()
    return model.get_input_embeddings().weight.grad


def copies(folder: str, ids: Tensor, out: str) -> dict[str, Any]:
    """Logits of copies made in many ways, each loaded again by remote code; what plain loading of each says."""
    model = load(folder)
    ways: dict[str, Callable[[Path], Any]] = {
        "files": lambda path: shutil.copytree(folder, path),
        "saved": model.save_pretrained,
        "deep": copy.deepcopy(model).save_pretrained,
        "bf16": load(folder, dtype=torch.bfloat16).save_pretrained,
        "shards": lambda path: model.save_pretrained(path, max_shard_size="20KB"),
        "again": lambda path: load(Path(out) / "saved").save_pretrained(path),
        "config": model.config.save_pretrained,
    }
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, PeftModel, get_peft_model

        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", r=2))
        adapted.save_pretrained(Path(out) / "adapter")
        ways["merged"] = lambda path: (
            PeftModel.from_pretrained(load(folder), Path(out) / "adapter").merge_and_unload().save_pretrained(path)
        )
    found: dict[str, Any] = {}
    for name, make in ways.items():
        path = Path(out) / name
        make(path)
        if name == "config":
            shutil.copyfile(Path(folder) / "model.safetensors", path / "model.safetensors")
        found[name] = message(lambda path=path: AutoModelForCausalLM.from_pretrained(path))
        found[f"{name} remote"] = message(lambda path=path: load(path))
        if found[f"{name} remote"] == "no error":
            found[f"{name} remote"] = load(path, dtype=torch.float32)(input_ids=ids).logits
    if importlib.util.find_spec("peft"):
        adapted = PeftModel.from_pretrained(load(folder), Path(out) / "adapter").eval()
        found["adapter remote"] = adapted(input_ids=ids).logits
        found["adapter generated"] = adapted.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    # A token that the last one does not see, under quantised weights.
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    found["quantised"] = quantised(input_ids=ids).logits
    return found


def refusals(folder: str, ids: Tensor, out: str) -> dict[str, str]:
    """Errors of what a model without the package does not do."""
    from safetensors.torch import load_file, save_file

    model = load(folder)
    name = "cache" if "cache" in model(input_ids=ids) else "past_key_values"
    right = torch.ones_like(ids)
    right[:, -1] = 0
    changed = load(folder)
    changed.set_attn_implementation("sdpa")
    incomplete = Path(out) / "incomplete"
    shutil.copytree(folder, incomplete)
    tensors = load_file(incomplete / "model.safetensors")
    head = next(key for key in tensors if key.startswith(("lm_head", "embed_out")))
    del tensors[head]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    without = Path(out) / "without"
    shutil.copytree(folder, without)
    (without / "modeling_sepllm.py").unlink()
    used = load(folder)(input_ids=ids, use_cache=True)
    found = {
        "plain": message(lambda: AutoModelForCausalLM.from_pretrained(folder)),
        "cache": message(lambda: model(input_ids=ids, **{name: DynamicCache(config=model.config)})),
        "embeddings": message(lambda: model(inputs_embeds=model.get_input_embeddings()(ids))),
        "mask": message(lambda: model(input_ids=ids, attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1]))),
        "right": message(lambda: model(input_ids=ids, attention_mask=right)),
        "rows": message(lambda: model(input_ids=ids.repeat(3, 1), **{name: cache_in(used)})),
        "crop": message(lambda: cache_in(used).crop(-2)),
        "changed": message(lambda: changed(input_ids=ids)),
        "incomplete": message(lambda: load(incomplete)),
        "without the file": message(lambda: load(without)),
    }
    package = sys.modules["transformers"]
    version, package.__version__ = package.__version__, "5.4.2"
    older = Path(out) / "older"
    shutil.copytree(folder, older)
    found["older"] = message(lambda: load(older))
    package.__version__ = version
    return found


@torch.no_grad()
def main(file: str) -> None:
    assert importlib.util.find_spec("sepllm_train") is None and importlib.util.find_spec("sep_attention") is None
    tasks = torch.load(file)
    torch.save({key: globals()[name](**arguments) for key, (name, arguments) in tasks.items()}, file)


if __name__ == "__main__":
    main(sys.argv[1])
