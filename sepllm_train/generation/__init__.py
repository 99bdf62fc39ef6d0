"""Generation: the separator cache, its policies, sampling."""
