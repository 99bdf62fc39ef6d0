"""The cases: what is recorded of each revision. A job is what side.py is given; its keys depend on its kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Stored data are unpacked in the folder that the cases of a side run in.
SMALL = (
    "+experiment=demo_sep",
    "model.layers=2",
    "model.hidden=64",
    "model.heads=4",
    "model.ffn=128",
    "attention.window=32",
    "data=prefixes",
    "data.prefixes=[data/guide]",
    "data.sequence_length=256",
    "data.validation_fraction=0.1",
    "data.workers=0",
    "training.steps=6",
    "training.validation_interval=3",
    "training.checkpoint_interval=3",
    "training.keep_checkpoints=2",
    "optim.lr=4.0e-3",
    # As before rates were filled from the model's recipe.
    "optim.min_lr=2.0e-4",
    "optim.warmup_steps=1",
)
BLEND = "data.prefixes=[{path: data/guide, weight: 0.7}, {path: data/notes, weight: 0.3}]"
# Horizons within the sequence, so that every tier hides something.
TIERS = (
    "attention=tiers",
    "attention.window=32",
    "attention.separators.0.horizon=48",
    "attention.separators.1.horizon=96",
    "attention.separate_documents=true",
    "attention.sink=learned",
)
PROMPTS = [
    "A token attends to the first tokens, to its neighbours, and to the separators before them. ",
    "Losses, tokens and FLOPs repeat:\n\n- the same data,",
]
CACHES: dict[str, dict[str, Any]] = {
    "pattern": {"cache": "pattern"},
    "sep": {"cache": "sep", "initial": 3, "separators": 8, "window": 16, "capacity": 48},
    "streaming": {"cache": "streaming", "initial": 3, "window": 16, "capacity": 32},
}
THEIR_CACHES: dict[str, dict[str, Any]] = {
    "pattern": {"class": "PatternCache"},
    "sep": {"class": "SepCache", "initial": 3, "separators": 8, "window": 16, "capacity": 48},
}
SUITE = (
    "+suite=paper",
    "suite.size=toy",
    "suite.prefix=data/guide",
    "suite.lengths=[128]",
    "suite.seeds=[1]",
)


@dataclass(frozen=True)
class Case:
    """A job for `ranks` processes, which read what the cases of `needs` wrote. `cost` is its weight in the estimate of
    the time left."""

    name: str
    job: dict[str, Any]
    ranks: int = 1
    needs: tuple[str, ...] = field(default=())
    cost: int = 1


def trained(name: str, *overrides: str, ranks: int = 1, needs: tuple[str, ...] = ()) -> Case:
    """A short training run of SMALL with `overrides`."""
    job = {"kind": "train", "name": name, "arguments": [*SMALL, *overrides, f"name={name}"]}
    return Case(name, job, ranks, needs, cost=ranks)


def order(name: str, *overrides: str) -> Case:
    """The samples of more than one epoch: `guide` has 111 samples to train on."""
    return Case(name, {"kind": "data_order", "arguments": [*SMALL, *overrides], "batches": 36})


CASES = (
    trained("dense", "attention=dense"),
    trained("sep"),
    trained("tiers", *TIERS),
    trained("tied", "model.tied_embeddings=true"),
    trained("llama", "model=llama_demo", *SMALL[1:5], "model.kv_heads=2", "attention.qk_norm=true"),
    trained("aligned_vocabulary", "model.vocabulary=768"),
    trained("bf16", "training.precision=bf16"),
    trained("full_recompute", "training.recompute=full"),
    trained("selective_recompute", "training.recompute=selective", "training.loss_chunk=64"),
    trained("tensor2", "parallel.tensor=2", ranks=2),
    trained("tensor2_sequence", "parallel.tensor=2", "parallel.sequence=true", ranks=2),
    trained("pipeline2", "parallel.pipeline=2", ranks=2),
    trained("interleaved", "model.layers=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2", ranks=2),
    trained("context2", "parallel.context=2", ranks=2),
    trained("sharded_optimizer", "parallel.sharded_optimizer=true", ranks=2),
    trained("resume", "resume=runs/sep/checkpoints/step_00000003", needs=("sep",)),
    trained("resume_other_layout", "resume=runs/tensor2/checkpoints/step_00000003", needs=("tensor2",)),
    order("data_order"),
    order("data_order_blend", BLEND),
    Case("export", {"kind": "export", "name": "sep", "run": "sep", "arguments": []}, needs=("sep",)),
    Case(
        "native_cache",
        {"kind": "native_cache", "run": "sep", "prompts": PROMPTS, "tokens": 64, "caches": CACHES},
        needs=("sep",),
    ),
    Case(
        "transformers_cache",
        {
            "kind": "transformers_cache",
            "model": "sep",
            "ids": [7 * number % 599 + 1 for number in range(40)],
            "tokens": 64,
            "caches": THEIR_CACHES,
        },
        needs=("export",),
    ),
    Case("comparison", {"kind": "comparison", "runs": ["dense", "sep"]}, needs=("dense", "sep")),
    Case(
        "evaluation",
        {
            "kind": "evaluation",
            "run": "sep",
            "arguments": [
                "--tasks=lambada,arc_easy,wikitext",
                "--data-dir=data/tasks",
                "--baselines=dense",
                "--threads=1",
            ],
        },
        needs=("sep",),
        cost=2,
    ),
    Case("suite_plan", {"kind": "suite_plan", "arguments": [*SUITE, "suite.root=planned"]}),
    Case(
        "suite",
        {
            "kind": "suite",
            "arguments": [*SUITE, "suite.only.rows=[dense,sep]", "suite.do=[train,evaluate,report]"],
        },
        cost=4,
    ),
)
BY_NAME = {case.name: case for case in CASES}


def with_needs(names: list[str]) -> list[Case]:
    """The named cases and all that they need, in the order of CASES, where needs come first."""
    wanted: set[str] = set()
    for case in reversed(CASES):
        if case.name in names or case.name in wanted:
            wanted |= {case.name, *case.needs}
    return [case for case in CASES if case.name in wanted]
