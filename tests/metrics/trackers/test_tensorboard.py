"""TensorBoard, read back with its own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.metrics.trackers.conftest import Tracked

reader = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard is not installed"
)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar, as TensorBoard shows them."""
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tensorboard", "tensorboard_resumed"])
def test_scalars_are_metrics_jsonl(tracked: Tracked, name: str) -> None:
    """Each value at its step; the counters of a step that has several records are there several times, and equal."""
    shown = scalars(tracked.root / name)
    rows = tracked.rows(name)
    assert set(shown) == {key for row in rows for key in row} - {"step"}
    for key, points in shown.items():
        assert [step for step, _ in points] == sorted(step for step, _ in points)
        expected = {row["step"]: row[key] for row in rows if key in row}
        assert dict(points) == pytest.approx(expected, rel=1e-6), key
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in shown["val/loss"]] == [0, 2, 4]


@pytest.mark.distributed
def test_the_run_is_described(tracked: Tracked) -> None:
    events = reader.EventAccumulator(str(tracked.root / "tensorboard" / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("run/text_summary")
    assert b"separator_density" in text.tensor_proto.string_val[0]
