"""The model of the tests that start real runs: a step takes some ten milliseconds."""

SMALL_MODEL = (
    "model.layers=2",
    "model.hidden=64",
    "model.heads=4",
    "model.ffn=128",
    "data.sequence_length=128",
    "data.workers=0",
)
