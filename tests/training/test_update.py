"""Parts of the update of a step."""

from __future__ import annotations

import pytest
import torch

from sepllm_train.training.update import square_sum


@pytest.mark.parametrize(
    "shapes",
    [[(50304, 768)], [(768 * 50304 + 37,)], [(1,), (1023,), (1024,), (1025,), (3, 5, 7)], [(0,), (2000,)]],
    ids=["embedding", "flat", "short", "empty"],
)
def test_the_sum_of_squares_is_that_of_double_precision(shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(1)
    grads = [1e-3 * torch.randn(shape, generator=generator) for shape in shapes]
    exact = sum(float(grad.double().square().sum()) for grad in grads)
    assert float(square_sum(grads)) == pytest.approx(exact, rel=1e-7)


def test_parts_of_a_matrix_add_up_to_the_whole() -> None:
    """As ranks of tensor parallelism hold them: by columns, by rows."""
    whole = torch.randn(4096, 768, generator=torch.Generator().manual_seed(2))
    for axis in (0, 1):
        parts = [square_sum([part.contiguous()]) for part in whole.chunk(2, axis)]
        assert float(sum(parts)) == pytest.approx(float(square_sum([whole])), rel=1e-7)


def test_what_is_no_number_is_seen() -> None:
    assert float(square_sum([])) == 0.0
    assert torch.isnan(square_sum([torch.zeros(5000), torch.tensor([float("nan")])]))
    spoiled = torch.zeros(5000)
    spoiled[4321] = float("inf")
    assert float(square_sum([spoiled])) == float("inf")
