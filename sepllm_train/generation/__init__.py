"""Using what was trained: the separator cache, generation, streaming."""
