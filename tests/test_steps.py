"""The residual form that the benchmarks compare with, against the mixture: a whole network."""

from unittest import mock

import pytest
import steps
import torch
from torch.nn.functional import cross_entropy

from bayes_lora import factors
from bayes_lora.distributions import HardConcrete
from bayes_lora.network import AdaptedNetwork, Latents


@pytest.fixture
def loss(backbone, batch, adapter_weights):
    """A step's loss and all its gradients; the levels of every tensor have one range."""
    network = AdaptedNetwork(backbone(), rank=3)
    network.calibrate([batch], adapter_weights(network))
    network.double()
    for layer in network._layers:
        for limits in (layer.weight_limits, layer.input_limits, layer.hidden_limits):
            limits.copy_(limits[2].expand_as(limits).clone())
    draw = torch.Generator().manual_seed(0)
    weights = adapter_weights(network).double().requires_grad_()
    gates = [
        HardConcrete(2 / 3, logits=torch.zeros(shape)).rsample().double().requires_grad_()
        for shape in (network.rank_gate_shape, network.bit_gate_shape)
    ]
    assert all(0.2 < ((gate > 0) & (gate < 1)).double().mean() < 0.8 for gate in gates)
    labels = torch.randint(2, (5,), generator=draw)
    trained = [p for p in network.parameters() if p.requires_grad]

    def found():
        network.zero_grad()
        value = cross_entropy(network(batch, Latents(weights, *gates)).double(), labels)
        for leaf in (weights, *gates):
            leaf.grad = None
        value.backward()
        # a gate at 0 or 1 was clamped, and has no gradient
        of_gates = [g.grad[(g > 0) & (g < 1)] for g in gates]
        return value, weights.grad, *of_gates, *(p.grad for p in trained)

    return found


def test_the_fast_path_equals_the_recursion_in_value_and_gradient(loss, monkeypatch):
    def one_range(x, dims, bits):
        limit = factors_limits(x, dims, bits)[2]
        return limit.expand(len(bits), *limit.shape)

    factors_limits = factors.gaussian_limits
    monkeypatch.setattr(factors, "gaussian_limits", one_range)
    fast = loss()
    with mock.patch.object(factors, "quantize_mixture", wraps=factors.quantize_mixture) as ours:
        loss()
    assert ours.call_count == 5  # A and B of two widths each, and e
    slow = []
    steps.with_residuals(lambda: slow.extend(loss()))()
    assert fast[3].abs().max() > 1e-4  # gates of bits matter
    for mine, plain in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-6)
