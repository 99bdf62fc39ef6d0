"""Keys that the last token of a GSM8K prompt keeps, over all keys so far: the paper's runtime KV, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.tokenizers import Tokenizer
from sepllm_train.base.errors import UserError


@dataclass(frozen=True)
class KeptShare:
    """share: tokens kept over all tokens, sums over the prompts; mean: of the prompts' own shares; tokens: mean length
    of a prompt."""

    share: float
    mean: float
    prompts: int
    tokens: float


def gsm8k_prompts(data_dir: Path) -> list[str]:
    """The prompts of all test questions. Raises UserError for files that are missing or not in their form."""
    from sepllm_train.evaluation.tasks import local_files, read_records, same

    test = local_files("gsm8k_cot", data_dir)["test"]
    examples = test.with_name("cot_8shot.jsonl")
    if not examples.is_file():
        raise UserError(f"gsm8k_cot needs {examples}, and it is not there.")
    shots = read_records(examples, {"question": str, "target": str}, same)
    questions = read_records(test, {"question": str}, same)
    before = "".join(f"Q: {shot['question']}\nA: {shot['target']}\n\n" for shot in shots)
    return [f"{before}Q: {record['question']}\nA:" for record in questions]


def kept_share(
    prompts: Sequence[Sequence[int]], separators: Sequence[int], window: int, initial: int, interval: int | None = None
) -> KeptShare:
    """Share of keys that the last tokens keep. interval: every interval-th token of a prompt for `separators`."""
    kept = np.zeros(len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts])
    for number, prompt in enumerate(prompts):
        position = np.arange(len(prompt))
        far = np.isin(prompt, separators) if interval is None else position % interval == 0
        kept[number] = np.sum((position < initial) | far | (position >= len(prompt) - window))
    return KeptShare(kept.sum() / lengths.sum(), float(np.mean(kept / lengths)), len(prompts), float(lengths.mean()))


def separators_of(tokenizer: Tokenizer, classes: str) -> list[int]:
    """Ids of the separators of the `classes`, or of none. Raises UserError."""
    from sepllm_train.generation.pattern import separator_ids

    if classes == "none":
        return []
    try:
        return separator_ids(tokenizer, classes)
    except ValueError as error:
        raise UserError(str(error)) from None
