"""The mixture of quantizers against the residual recursion of Bayesian Bits, written out here."""

import pytest
import torch

from bayes_lora.distributions import HardConcrete
from bayes_lora.gates import level_weights
from bayes_lora.quantization import Mixture, quantize, quantize_mixture
from bayes_lora.ranges import gaussian_limits

BITS = (2, 4, 8, 16)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def residual_recursion(x, gates, limit):
    """x2 + z4 (e4 + z8 (e8 + z16 e16)), every e rounded to its own finer grid."""
    x = x.clamp(-limit * (1 - 1e-7), limit * (1 - 1e-7))
    step = 2 * limit / (2**2 - 1)
    value = step * Round.apply(x / step)
    residuals = []
    for bits in BITS[1:]:
        step = step / (2 ** (bits // 2) + 1)
        residual = step * Round.apply((x - value) / step)
        residuals.append(residual)
        value = value + residual
    total = torch.zeros_like(x)
    for z, residual in zip(reversed(gates.unbind()), reversed(residuals), strict=True):
        total = z * (residual + total)
    first = 2 * limit / 3
    return first * Round.apply(x / first) + total


def mixture_of(gates):
    weights = level_weights(gates)
    active = tuple(i for i, w in enumerate(weights.tolist()) if w > 0)
    return Mixture(weights, active)


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 50, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "gates", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1), (0.7, 0.4, 0.9), (1, 0.3, 0), (0.2, 1, 1)]
)
@pytest.mark.parametrize("limit", [0.8, 4.0])
def test_mixture_equals_the_residual_recursion(gates, limit):
    upstream = torch.randn(6, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    results = []
    for function in (
        lambda x, z: quantize_mixture(
            x, torch.full((4,), limit, dtype=torch.float64), mixture_of(z)
        ),
        lambda x, z: residual_recursion(x, z, limit),
    ):
        x = data().requires_grad_()
        z = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
        value = function(x, z)
        value.backward(upstream)
        results.append((value, x.grad, z.grad))
    (value, x_grad, z_grad), (value_ref, x_grad_ref, z_grad_ref) = results
    torch.testing.assert_close(value, value_ref, atol=1e-12, rtol=0)
    torch.testing.assert_close(x_grad, x_grad_ref, atol=1e-12, rtol=0)
    undecided = torch.tensor([0 < z < 1 for z in gates])
    if undecided.any():  # a decided gate is clamped and has no gradient: see the next test
        torch.testing.assert_close(z_grad[undecided], z_grad_ref[undecided], atol=1e-9, rtol=0)


def test_skipping_levels_of_weight_zero_is_exact_in_the_gradient_of_the_logits():
    upstream = torch.randn(6, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    decided = 0
    for seed in range(40):
        gradients = []
        for function in (
            lambda x, z: quantize_mixture(
                x, torch.full((4,), 3.0, dtype=torch.float64), mixture_of(z)
            ),
            lambda x, z: residual_recursion(x, z, 3.0),
        ):
            logits = torch.tensor([1.5, 0.2, -0.5], dtype=torch.float64, requires_grad=True)
            torch.manual_seed(seed)
            z = HardConcrete(2 / 3, logits=logits).rsample()
            decided += int(((z == 0) | (z == 1)).sum())
            function(data().requires_grad_(), z).backward(upstream)
            none = torch.zeros(3, dtype=torch.float64)
            gradients.append(none if logits.grad is None else logits.grad)
        torch.testing.assert_close(*gradients, atol=1e-9, rtol=0)
    assert decided > 20  # the case was met


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_grid_has_the_stated_points_and_fits_into_its_bits(bits):
    limit = torch.tensor(1.7, dtype=torch.float64)
    x = torch.linspace(-3, 3, 400_001, dtype=torch.float64)
    values = quantize(x, limit, bits)
    step = 2 * 1.7 / (2**bits - 1)
    index = values / step
    torch.testing.assert_close(index, index.round(), atol=1e-9, rtol=0)
    assert int(index.abs().max().round()) == 2 ** (bits - 1) - 1
    assert len(index.round().unique()) == 2**bits - 1
    inside = x.abs() < 1.7 - step / 2
    assert float((values - x)[inside].abs().max()) <= step / 2 + 1e-12


def test_gradient_is_straight_through_inside_the_range_of_each_level():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5], requires_grad=True)
    limits = torch.tensor([1.0, 2.0])
    quantize_mixture(x, limits, Mixture(torch.tensor([0.3, 0.7]), (0, 1))).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0.7, 0.0, 1.0]))


def test_the_largest_value_of_its_own_range_keeps_its_gradient():
    x = torch.randn(4, 9).requires_grad_()
    limits = gaussian_limits(x, (1,), (16,))
    quantize_mixture(x, limits, Mixture(torch.ones(1), (0,))).sum().backward()
    assert (x.grad == 1).all()


def test_a_decided_frozen_weight_asks_for_no_gradient():
    weights = torch.tensor([0.0, 1.0], requires_grad=True)
    frozen = torch.randn(3, 4)
    assert not quantize_mixture(frozen, torch.ones(2), Mixture(weights, (1,))).requires_grad
    assert quantize_mixture(frozen, torch.ones(2), Mixture(weights, (0, 1))).requires_grad
