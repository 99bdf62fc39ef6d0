"""The training run: setup, steps, loop, run folder."""

from sepllm_train.distributed.optional import quiet_imports

with quiet_imports():
    import megatron.core.optimizer  # noqa: F401  first import, where the warnings are
