"""Allocation of ranks and bits, against every configuration."""

import itertools

import numpy as np
import pytest
import torch

from bayes_lora.costs import adapter_bytes, bit_operations, uniform_bits
from bayes_lora.gates import independent, nested
from bayes_lora.inference.allocation import (
    allocate,
    better_options,
    layer_bops,
    layer_bytes,
    lower_hull,
)
from bayes_lora.layers import TENSORS
from bayes_lora.models.model import Gates
from bayes_lora.network import AdaptedNetwork


@pytest.fixture
def case(backbone):
    """Two layers of rank 2, three tensors of two widths: 3 or 4 times 8 settings of each."""

    def make(structure=nested):
        network = AdaptedNetwork(
            backbone(num_hidden_layers=1), rank=2, alpha=4.0, num_levels=1, structure=structure,
            target_modules=r".*(query|intermediate\.dense)",
            quantized_tensors=("weight", "A", "input"),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(4)
        worth = Gates(
            10 * torch.rand(2, 2, generator=generator).double() - 2,
            10 * torch.rand(2, 3, 1, generator=generator).double() - 2,
        )
        decided = Gates(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.ones(2, 3, 1))
        decided.bit_gate[0, 1, 0] = 0.0
        return network, decided, worth

    return make


def everything(network, decided):
    """All decisions that open nothing more."""
    chains = [
        [
            torch.tensor(row)
            for row in itertools.product(*([0.0, 1.0] if g else [0.0] for g in gate))
        ]
        for gate in [*decided.rank_gate, *decided.bit_gate.flatten(0, 1)]
    ]
    chains = [
        rows
        if i < 2 and network.structure is independent
        else [row for row in rows if torch.equal(row, row.cumprod(0))]
        for i, rows in enumerate(chains)
    ]
    for rows in itertools.product(*chains):
        yield Gates(torch.stack(rows[:2]), torch.stack(rows[2:]).view(2, 3, 1))


def lost(decided, worth, gates):
    pairs = zip(decided, worth, gates, strict=True)
    return float(sum(((d - g).double() * w).sum() for d, w, g in pairs))


@pytest.mark.parametrize("structure", [nested, independent])
@pytest.mark.parametrize(
    ("cost", "count"), [(layer_bops, bit_operations), (layer_bytes, adapter_bytes)]
)
def test_every_budget_is_met_at_little_loss(case, structure, cost, count):
    network, decided, worth = case(structure)

    def cost_of(gates):
        return float(count(network, *gates).double().sum())

    all_of = [(cost_of(g), lost(decided, worth, g)) for g in everything(network, decided)]
    least, most = min(c for c, _ in all_of), cost_of(decided)
    used, losses, optimal = [], [], []
    for budget in np.linspace(least, most, 23):
        gates, loss = allocate(network, decided, worth, cost, budget)
        used.append(cost_of(gates))
        assert used[-1] <= budget * (1 + 1e-9)
        assert all((g <= d).all() for g, d in zip(gates, decided, strict=True))
        assert loss == pytest.approx(lost(decided, worth, gates), abs=1e-9)
        losses.append(loss)
        optimal.append(loss <= min(v for c, v in all_of if c <= budget + 1e-9) + 1e-9)
    assert used == sorted(used)  # a tighter budget never uses more
    assert losses == sorted(losses, reverse=True)  # nor loses less
    assert len(set(used)) > 2
    assert sum(optimal) > len(optimal) / 2  # of all that the budget pays for
    assert losses[-1] == pytest.approx(min(v for _, v in all_of))
    assert losses[-1] < 0  # some are worth less than nothing
    if least > 0:
        with pytest.raises(ValueError, match="left with every gate closed"):
            allocate(network, decided, worth, cost, least * 0.999)


def test_equal_worths_keep_their_order(backbone):
    """Slopes of one layer that differ by rounding alone: without end, a budget takes all steps."""
    network = AdaptedNetwork(backbone(num_hidden_layers=1), rank=3, alpha=3.0)
    shape = network.rank_gate_shape
    decided = Gates(torch.ones(shape), None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        each = torch.rand(shape[0], 1, generator=generator).double() * 1e-3
        worth = Gates(each.expand(shape).clone(), None)
        gates, loss = allocate(network, decided, worth, layer_bops, 1e30)
        assert gates.rank_gate.all()
        assert loss == 0


def test_a_layer_that_is_applied_at_two_depths_costs_twice(backbone):
    network = AdaptedNetwork(backbone("albert"), rank=2)
    bits = dict.fromkeys(TENSORS, np.array(4.0))
    found = [layer_bops(spec, np.array(2.0), bits) for spec in network.specs]
    np.testing.assert_array_equal(found, bit_operations(network, None, uniform_bits(network, 4)))
    assert found[0] == 2 * (16 * 16 * 4 * 4 + 2 * (16 + 1 + 16) * 4 * 4)


def test_the_hull_is_the_one_of_all_lines_below():
    generator = np.random.default_rng(5)
    costs, losses = generator.integers(0, 30, 200) / 2, generator.normal(size=200)
    better = better_options(costs, losses)
    assert (np.diff(costs[better]) > 0).all()
    assert (np.diff(losses[better]) < 0).all()
    hull = better[lower_hull(costs[better], losses[better])]
    assert losses[hull[-1]] == losses.min()
    assert costs[hull[0]] == costs.min()
    for slope in np.geomspace(1e-3, 1e3, 50):  # every line touches a corner first
        assert (losses + slope * costs).min() == (losses + slope * costs)[hull].min()
    slopes = np.diff(losses[hull]) / np.diff(costs[hull])
    assert (np.diff(slopes) > 0).all()
    assert (slopes < 0).all()
