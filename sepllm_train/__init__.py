"""Pretraining of GPTs with separator attention on megatron-core."""
