"""A, e and B of all layers at once, against each by itself."""

import torch

from bayes_lora import factors as module
from bayes_lora.factors import quantize_factors
from bayes_lora.gates import level_weights
from bayes_lora.quantization import Mixture, quantize_mixture
from bayes_lora.ranges import gaussian_limits

BITS = (2, 4, 8, 16)
SIZES = [(5, 7), (3, 7), (5, 4), (5, 7)]  # in and out: two layers of one shape
GATES = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.4], [1.0, 1.0, 1.0], [0.7, 0.6, 0.2]])
ALONE = {"A": (1,), "e": (0,), "B": (0,)}


def drawn():
    draw = torch.Generator().manual_seed(2)
    shapes = [((2, n), (2,), (m, 2)) for n, m in SIZES]
    return [tuple(torch.randn(s, generator=draw).requires_grad_() for s in of) for of in shapes]


def mixtures(gates, names):
    """Every tensor of a layer with gates of its own."""
    found = []
    for layer in range(len(SIZES)):
        weights = {n: level_weights(gates[layer].roll(k)) for k, n in enumerate(names)}
        found.append({n: Mixture(w, active(w)) for n, w in weights.items()})
    return found


def active(weights):
    return tuple(i for i, w in enumerate(weights.tolist()) if w > 0)


def gradients(quantized, factors, gates):
    """Of everything, with a gradient from above that is another for every entry."""
    draw = torch.Generator().manual_seed(3)
    flat = [value for layer in quantized for value in layer]
    loss = sum((torch.randn(v.shape, generator=draw) * v).sum() for v in flat)
    leaves = [gates, *(f for layer in factors for f in layer)]
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def test_all_at_once_equals_each_by_itself(monkeypatch):
    factors, gates = drawn(), GATES.clone().requires_grad_()
    mixed = mixtures(gates, "AeB")
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].shape)
        return quantize_mixture(*arguments)

    monkeypatch.setattr(module, "quantize_mixture", counted)
    together = quantize_factors(factors, mixed, BITS)
    assert sorted(calls) == [
        *((1, 2, 3), (1, 4, 2)), *((3, 2, 5), (3, 7, 2)), (4, 2)
    ]  # fmt: skip
    alone = [
        tuple(
            quantize_mixture(value, gaussian_limits(value, ALONE[name], BITS), layer[name])
            for name, value in zip("AeB", values, strict=True)
        )
        for values, layer in zip(factors, mixed, strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        for mine, reference in zip(one, other, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-7, rtol=0)
    found, expected = (gradients(q, factors, gates) for q in (together, alone))
    undecided = (GATES > 0) & (GATES < 1)  # others are clamped, and have no gradient
    torch.testing.assert_close(found[0][undecided], expected[0][undecided], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1:], expected[1:], atol=1e-6, rtol=0)


def test_what_has_no_gates_is_left_as_it_is():
    factors = drawn()
    found = quantize_factors(factors, mixtures(GATES, "B"), BITS)
    for mine, given in zip(found, factors, strict=True):
        assert mine[0] is given[0]
        assert mine[1] is given[1]
        assert not mine[2].equal(given[2])
