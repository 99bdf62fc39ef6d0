"""The training run: setup, steps, loop, run folder."""

from sepllm_train.base.quiet import quiet

with quiet():
    import megatron.core.optimizer  # noqa: F401  first import, where the warnings are
