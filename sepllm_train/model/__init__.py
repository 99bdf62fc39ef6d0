"""The GPT on megatron-core with separator attention."""

from sepllm_train.base.quiet import quiet

with quiet():
    import megatron.core.models.common.language_module.language_module  # noqa: F401  where the warnings are
