"""Two optimizer steps of tiny models in one layout of processes; run through distributed_runner."""

from __future__ import annotations

from typing import Any

import torch

from sepllm_train.config.schema import Config
from sepllm_train.distributed.launch import launch_from_environment, process_grid
from sepllm_train.distributed.optional import quiet_imports
from sepllm_train.model.build import build_model
from tests.model.tiny import LENGTH, LLAMA, PYTHIA, VOCABULARY, micro_batch, tiny_config

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

# (model, attention) of each row of the table.
PATTERNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (PYTHIA, {"pattern": "dense"}),
    "sep": (PYTHIA, {}),
    "first and last layer full": (PYTHIA, {"full_layers": "first_last"}),
    "windows, documents, sinks": (
        PYTHIA,
        {"window": [1, 3, 9, 27], "separate_documents": True, "sink": "learned"},
    ),
    "grouped queries, query-key norm": (LLAMA, {"qk_norm": True}),
    "tied embeddings": (LLAMA | {"tied_embeddings": True}, {}),
}
MICRO_BATCHES = 4


def train_all(layouts: list[dict[str, Any]]) -> dict[str, Any]:
    """Train every pattern in each of `layouts` ({parallel, training, without}), which share a process grid.

    Gives {index of the layout: {pattern: result of `train`}}, empty on ranks that see no loss.
    """
    first = tiny_config(parallel=layouts[0].get("parallel"))
    results: dict[str, Any] = {}
    with process_grid(first, launch_from_environment()):
        for number, layout in enumerate(layouts):
            results[str(number)] = {
                pattern: train(tiny_config(model, attention, layout.get("parallel"), layout.get("training")))
                for pattern, (model, attention) in PATTERNS.items()
                if pattern != layout.get("without")
            }
    return results


def train(config: Config) -> dict[str, list[Any]]:
    """Losses of every micro-batch of two steps (on the last stage), the gradient norm of each step, and the sinks'
    places in a distributed checkpoint."""
    torch.manual_seed(0)
    chunks = _chunks(config)
    settings = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=1.0, weight_decay=0.1)
    optimizer = get_megatron_optimizer(settings, chunks)
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(2):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = [micro_batch(config, seed=i) for i in range(MICRO_BATCHES)]
        reduced = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )
        losses += [entry["loss"].item() for entry in reduced]
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
    return {"losses": losses, "norms": norms, "sinks": [place for chunk in chunks for place in _sinks(chunk)]}


def _sinks(chunk: DistributedDataParallel) -> list[Any]:
    """(global shape, global offset) of each sink of a chunk, [layers, heads]."""
    shards = chunk.module.sharded_state_dict()
    return [(list(s.global_shape), list(s.global_offset)) for key, s in shards.items() if key.endswith("sink")]


def _chunks(config: Config) -> list[DistributedDataParallel]:
    """The model chunks of this rank, wrapped for data parallelism."""
    stages = config.parallel.virtual_pipeline or 1
    chunks = []
    for stage in range(stages):
        where = {"ignore_virtual": False, "vp_stage": stage} if stages > 1 else {}
        model = build_model(
            config,
            VOCABULARY,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            vp_stage=stage if stages > 1 else None,
        )
        chunks.append(DistributedDataParallel(model.config, DistributedDataParallelConfig(), model))
    return chunks


def _forward_step(batches: Any, model: Any) -> Any:
    """One micro-batch, as the schedule calls it."""
    data = next(batches)

    def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.mean()
        # The schedule divides the loss in place.
        return loss, {"loss": loss.detach().clone()}

    return model(data.tokens, data.positions, data.plan, labels=data.labels), loss_of
