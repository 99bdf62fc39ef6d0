"""Texts without end through a cache: perplexity token by token, and generation that goes on."""
