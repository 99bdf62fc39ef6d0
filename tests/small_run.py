"""The model of the tests that start real runs, and the short run of tests/training: a step takes milliseconds."""

SMALL_MODEL = (
    "model.layers=2",
    "model.hidden=64",
    "model.heads=4",
    "model.ffn=128",
    "data.sequence_length=128",
    "data.workers=0",
)
SMALL_RUN = (
    "+experiment=demo_sep",
    *SMALL_MODEL,
    "training.steps=4",
    "training.validation_interval=2",
    "training.checkpoint_interval=2",
)
