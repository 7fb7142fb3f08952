"""Gates against enumeration of all their configurations."""

import itertools

import pytest
import torch

from bayes_lora.gates import (
    expected_bits,
    independent,
    level_bits,
    level_weights,
    nested,
    rank_probabilities,
)

PROBS = [0.9, 0.35, 0.8, 0.05]


def leading_ones(gates):
    return len(list(itertools.takewhile(bool, gates)))


@pytest.mark.parametrize(("structure", "rank_of"), [(nested, leading_ones), (independent, sum)])
def test_rank_distribution_equals_enumeration(structure, rank_of):
    expected = torch.zeros(len(PROBS) + 1, dtype=torch.float64)
    for gates in itertools.product([0, 1], repeat=len(PROBS)):
        probability = 1.0
        for z, p in zip(gates, PROBS, strict=True):
            probability *= p if z else 1 - p
        expected[rank_of(gates)] += probability
        weights = structure(torch.tensor(gates, dtype=torch.float64))
        assert int(weights.sum()) == rank_of(gates)
    found = rank_probabilities(torch.tensor(PROBS, dtype=torch.float64), structure)
    torch.testing.assert_close(found, expected)


def test_level_weights_and_bits_of_decided_gates():
    for gates in itertools.product([0.0, 1.0], repeat=3):
        weights = level_weights(torch.tensor(gates))
        level = leading_ones(gates)
        assert weights.tolist() == [float(i == level) for i in range(4)]
        assert float(expected_bits(torch.tensor(gates))) == level_bits(3)[level]


def test_level_weights_of_soft_gates_sum_to_one_over_any_leading_shape():
    weights = level_weights(torch.rand(4, 6, 3, dtype=torch.float64))
    assert weights.shape == (4, 6, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 6, dtype=torch.float64))
    assert (weights >= 0).all()


def test_nested_gates_have_a_gradient_beyond_a_closed_one():
    gates = torch.tensor([1.0, 0.0, 0.5], requires_grad=True)
    nested(gates)[2].backward()  # z1 z2 z3
    assert gates.grad.tolist() == [0.0, 0.5, 0.0]
