"""Data of a run: corpora, samples with separator classes, micro-batches."""

from sepllm_train.base.quiet import quiet

with quiet():
    import megatron.core.datasets.gpt_dataset  # noqa: F401  first import, where the warnings are
