"""Ranges of the quantizers: the least error, and what they must keep."""

import pytest
import torch

from bayes_lora.quantization import Mixture, quantize, quantize_mixture
from bayes_lora.ranges import GAUSSIAN_RANGE, gaussian_limits, searched_limits

BITS = (2, 4, 8, 16)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stated_gaussian_range_has_the_least_error(bits):
    # the error of a normal variable by quadrature, not by sampling
    x = torch.linspace(-9, 9, 360_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)

    def error(limit):
        difference = quantize(x, torch.tensor(limit, dtype=torch.float64), bits) - x
        return float((density * difference**2).sum())

    stated = GAUSSIAN_RANGE[bits]
    assert error(stated) < min(error(0.98 * stated), error(1.02 * stated))


def test_searched_range_is_no_worse_than_the_largest_value_and_the_normal_one():
    heavy = torch.distributions.StudentT(3.0).sample((20_000,))
    limits = searched_limits(heavy, (0,), (2, 4, 8))
    for level, bits in enumerate((2, 4, 8)):
        found = (quantize(heavy, limits[level], bits) - heavy).square().mean()
        largest = (quantize(heavy, heavy.abs().max(), bits) - heavy).square().mean()
        normal = (quantize(heavy, gaussian_limits(heavy, (0,), (bits,))[0], bits) - heavy).square()
        assert found <= largest
        assert found <= 1.05 * normal.mean()  # the search has steps of 19 %


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_on_a_grid_of_b_bits_are_kept_by_the_searched_range(bits):
    weight = quantize(torch.randn(7, 50), torch.rand(7, 1) + 0.5, bits)
    (limit,) = searched_limits(weight, (1,), (bits,))
    torch.testing.assert_close(quantize(weight, limit, bits), weight, rtol=1e-6, atol=1e-7)


def test_values_of_zero_stay_zero_at_every_level():
    zeros = torch.zeros(3, 5)
    for weights in torch.eye(4):
        limits = gaussian_limits(zeros, (1,), BITS)
        active = (int(weights.argmax()),)
        assert (quantize_mixture(zeros, limits, Mixture(weights, active)) == 0).all()
