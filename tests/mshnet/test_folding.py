"""Linear layers computed as one, against the layers one after the other: values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mshnet.folding import conv_after_projection, conv_of_resized, projected_bias
from mshnet.masking import resize
from tests import tolerances

BOUND = tolerances.SAME_COMPUTATION.bound


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("small", "large"), [((3, 5), (6, 9)), ((4, 4), (4, 4)), ((6, 7), (3, 2)), ((1, 1), (3, 4)), ((2, 3), (1, 1))]
)
def test_convolution_of_a_resized_map(small: tuple[int, int], large: tuple[int, int], with_bias: bool) -> None:
    x, weight = random(2, 3, *small).requires_grad_(), random(4, 3, 3, 3).requires_grad_()
    bias = random(4).requires_grad_() if with_bias else None
    found = conv_of_resized(x, weight, large, bias)
    expected = F.conv2d(resize(x, large), weight, bias, padding=1)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()
    inputs = [x, weight, *([bias] if bias is not None else [])]
    along = random(*expected.shape)
    for of_found, of_expected in zip(
        torch.autograd.grad(found, inputs, along), torch.autograd.grad(expected, inputs, along), strict=True
    ):
        assert (of_found - of_expected).abs().max() <= BOUND * of_expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 4)])
def test_convolution_behind_a_projection(size: tuple[int, int]) -> None:
    """The projection's bias is not padded, so it is worth less at the border."""
    x, projection, bias = random(2, 3, *size), random(6, 3, 1, 1), random(6)
    weight = random(4, 6, 3, 3)
    expected = F.conv2d(F.conv2d(x, projection, bias), weight, padding=1)
    found = F.conv2d(x, conv_after_projection(weight, projection), padding=1) + projected_bias(weight, bias, size)
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()


def test_the_border_of_a_projected_bias() -> None:
    found = projected_bias(torch.ones(1, 2, 3, 3), torch.tensor([1.0, 0.5]), (3, 4))[0, 0]
    # Nine taps inside, six at an edge, four in a corner, each of 1 + 0.5.
    assert found.tolist() == [[6.0, 9.0, 9.0, 6.0], [9.0, 13.5, 13.5, 9.0], [6.0, 9.0, 9.0, 6.0]]
