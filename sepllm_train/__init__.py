"""Pretraining of GPTs with separator attention on megatron-core.

The program is `sepllm`, also `python -m sepllm_train`. Public modules are listed in docs/api.md: `sepllm_train.hf`
(models of transformers), `sepllm_train.runs.open` (trained runs), `sep_attention` (the op) and readers of `data_prep`.
"""
