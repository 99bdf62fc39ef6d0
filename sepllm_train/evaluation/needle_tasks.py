"""Needle tasks for lm-evaluation-harness, of records that are made for the tokenizer and the context of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sized
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.evaluation.needles import ANSWER, KINDS, Record, make_needles
from sepllm_train.evaluation.options import NeedleOptions

# The longest prompt that is made unless others are asked for: the harness's.
LONGEST = 4096
_METRIC = "string_match_all"


def needle_records(
    encode: Callable[[str], Sized], kind: str, lengths: tuple[int, ...], options: NeedleOptions, text: str | None
) -> list[Record]:
    """Records of every length by turns, so that the first ones are of all lengths; `index` counts them."""
    made = [make_needles(encode, kind, length, options.count, options.seed, text) for length in lengths]
    turns = [record for turn in zip(*made, strict=True) for record in turn]
    return [{**record, "index": index} for index, record in enumerate(turns)]


def needle_task(
    kind: str, encode: Callable[[str], Sized], context: int, options: NeedleOptions, haystack: Callable[[], str]
) -> tuple[Any, dict[str, Any]]:
    """The harness's task of a kind of needles, and where its data is from.

    Its metric is RULER's string_match_all: the mean share of a record's answers that are in the ANSWER tokens that are
    generated, over all records and, under its name, over those of each length. context: of the model, in tokens. Raises
    UserError for a length above it, and as make_needles does.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask

    lengths = options.lengths or (min(context, LONGEST),)
    if max(lengths) > context:
        raise UserError(
            f"{kind} of {max(lengths):,} tokens is longer than the model's context of {context:,}: ask for shorter "
            "ones with --lengths."
        )
    text = haystack() if KINDS[kind].haystack == "text" else None
    records = needle_records(encode, kind, lengths, options, text)
    task = ConfigurableTask(
        config={
            "task": kind,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(records)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}",
            "generation_kwargs": {"do_sample": False, "temperature": 0.0, "max_gen_toks": ANSWER, "until": []},
            "process_results": _score,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in (_METRIC, *map(str, lengths))
            ],
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
    )
    content = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    source = None if text is None else str(options.haystack or "hub")
    made = {"lengths": list(lengths), "count": options.count, "seed": options.seed, "haystack": source}
    return task, {"source": "needles", "made": made, "files": {"test": {"path": None, "sha256": content}}}


def essays() -> str:
    """The haystack of RULER's own tasks, from the hub."""
    import datasets

    return " ".join(datasets.load_dataset("baber/paul_graham_essays", split="train")["text"])


def _score(record: Record, answers: list[str]) -> dict[str, float]:
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    return dict.fromkeys(
        (_METRIC, str(record["max_length"])), string_match_all(postprocess_pred(answers), [record["outputs"]])
    )
