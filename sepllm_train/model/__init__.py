"""The GPT on megatron-core with separator attention."""

from sepllm_train.distributed.optional import quiet_imports

with quiet_imports():
    import megatron.core.models.common.language_module.language_module  # noqa: F401  where the warnings are
