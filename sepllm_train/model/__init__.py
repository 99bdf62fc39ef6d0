"""The GPT on megatron-core with separator attention."""

from sepllm_train.distributed.optional import quiet_imports

with quiet_imports():
    import megatron.core.models.gpt.gpt_model  # noqa: F401  first import, where the warnings are
