r"""Allocate ranks and bits under a budget, by what each is worth (`worth.py`).

A decision's expected loss is the worth of all components and levels that it gives up; its costs
are sums over layers. So every layer has a lower convex hull of loss against cost. The steps of all
hulls, in the order of what they gain per unit of cost, pass through decisions of which each has the
least loss at its cost. A budget takes every step that it still pays for. So a tighter budget never
uses more, nor loses less: where two budgets first differ, the larger one takes a step that costs
more than all that is left of the smaller, and gains more than that could.

Source: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE
Transactions on Acoustics, Speech, and Signal Processing 36 (1988).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_lora.costs import FULL_BITS
from bayes_lora.gates import nested
from bayes_lora.layers import TENSORS
from bayes_lora.models.model import Gates
from bayes_lora.network import AdaptedNetwork
from bayes_lora.targets import LayerSpec

FloatArray = NDArray[np.float64]
Cost = Callable[[LayerSpec, FloatArray, dict[str, FloatArray]], FloatArray]
"""Cost of a layer at ranks and bits, arrays that broadcast."""


def layer_bops(spec: LayerSpec, rank: FloatArray, bits: dict[str, FloatArray]) -> FloatArray:
    """Bit operations per token, as `costs.bit_operations` counts them."""
    rows, columns = spec.out_features, spec.in_features
    adapter = columns * bits["A"] * bits["input"] + (bits["e"] + rows * bits["B"]) * bits["hidden"]
    return spec.uses * (rows * columns * bits["weight"] * bits["input"] + rank * adapter)


def layer_bytes(spec: LayerSpec, rank: FloatArray, bits: dict[str, FloatArray]) -> FloatArray:
    """Bytes of A, e and B, as `costs.adapter_bytes` counts them."""
    entries = spec.in_features * bits["A"] + bits["e"] + spec.out_features * bits["B"]
    return rank * entries / 8


class _Step(NamedTuple):
    """One step up the hull of a layer, from one of its better options to another."""

    slope: float
    layer: int
    start: int
    end: int


def allocate(
    network: AdaptedNetwork, decided: Gates, worth: Gates, cost: Cost, budget: float
) -> tuple[Gates, float]:
    """Choose ranks and bits of little expected loss whose cost is within a budget.

    Parameters
    ----------
    network : AdaptedNetwork
        Its layers and their sizes.
    decided : Gates
        0 or 1, shapes (L, R) and (L, T, K): nothing that is closed here is opened.
    worth : Gates
        As of `worth.worth`, same shapes.
    cost : function
        `layer_bops` or `layer_bytes`, summed over the adapted layers.
    budget : float
        In the unit of `cost`.

    Returns
    -------
    tuple of Gates and float
        What is chosen, and how much log likelihood it is expected to lose against `decided`, nats;
        negative where `decided` keeps what its prior wants and the data do not.

    Raises
    ------
    ValueError
        If the budget is below what is left with every gate closed.
    """
    layers = [_Layer(network, decided, worth, index) for index in range(len(network.specs))]
    options = [layer.options(spec, cost) for layer, spec in zip(layers, network.specs, strict=True)]
    better = [better_options(costs.ravel(), losses.ravel()) for costs, losses in options]
    at = [
        (costs.ravel()[i], losses.ravel()[i])
        for (costs, losses), i in zip(options, better, strict=True)
    ]
    chosen = [0] * len(layers)
    left = budget - sum(float(costs[0]) for costs, _ in at)
    if left < 0:
        raise ValueError("the budget is below what is left with every gate closed")
    steps = []
    for index, (costs, losses) in enumerate(at):
        slope = np.inf
        for start, end in pairwise(lower_hull(costs, losses)):
            # rounding must not change the order of a layer's steps
            slope = min(slope, (losses[start] - losses[end]) / (costs[end] - costs[start]))
            steps.append(_Step(slope, index, start, end))
    for step in sorted(steps, key=lambda step: (-step.slope, step.layer)):
        costs = at[step.layer][0]
        price = float(costs[step.end] - costs[step.start])
        if chosen[step.layer] == step.start and price <= left:  # those before it are taken
            chosen[step.layer] = step.end
            left -= price
    gates = decided.map(torch.zeros_like)
    for layer, (costs, _), i, place in zip(layers, options, better, chosen, strict=True):
        layer.open(gates, tuple(map(int, np.unravel_index(i[place], costs.shape))))
    return gates, float(sum(losses[place] for (_, losses), place in zip(at, chosen, strict=True)))


def least_cost(network: AdaptedNetwork, decided: Gates, cost: Cost) -> float:
    """What is left of the cost with every gate closed; parameters are those of `allocate`."""
    closed = decided.map(torch.zeros_like)
    layers = (_Layer(network, closed, closed, index) for index in range(len(network.specs)))
    pairs = zip(layers, network.specs, strict=True)
    return sum(layer.options(spec, cost)[0].item() for layer, spec in pairs)


class _Layer:
    """What of one layer may be kept: leading components and levels of what is decided.

    An option is a tuple: how many components, and how many levels of every tensor that has gates.
    """

    def __init__(self, network: AdaptedNetwork, decided: Gates, worth: Gates, index: int) -> None:
        self.index = index
        self.tensors = network.quantized_tensors if decided.bit_gate is not None else ()
        # gates in the order in which they are kept, and their worth
        self.chains: list[tuple[Tensor, FloatArray]] = []
        for gate, gain, structure in zip(decided, worth, (network.structure, nested), strict=True):
            if gate is None or gain is None:
                continue
            size = gate.shape[-1]
            open_gates, gains = structure(gate[index]).view(-1, size), gain[index].view(-1, size)
            for mine, value in zip(open_gates, gains, strict=True):
                order = mine.nonzero().flatten()
                if structure is not nested:
                    order = order[value[order].argsort(descending=True)]
                self.chains.append((order, value[order].numpy()))
        self.full_rank = network.rank if decided.rank_gate is None else None

    def options(self, spec: LayerSpec, cost: Cost) -> tuple[FloatArray, FloatArray]:
        """Cost and expected loss of every option, an axis for each chain."""
        counts = np.ix_(*(np.arange(len(order) + 1.0) for order, _ in self.chains))
        lost = np.ix_(*(np.append(gain[::-1].cumsum()[::-1], 0.0) for _, gain in self.chains))
        bits = dict.fromkeys(TENSORS, np.array(float(FULL_BITS)))
        rank, of_tensors = (
            (counts[0], counts[1:])
            if self.full_rank is None
            else (np.array(float(self.full_rank)), counts)
        )
        bits |= {t: 2.0 ** (n + 1) for t, n in zip(self.tensors, of_tensors, strict=True)}
        losses = sum(lost, np.zeros(()))
        return np.broadcast_to(cost(spec, rank, bits), losses.shape), losses

    def open(self, gates: Gates, kept: tuple[int, ...]) -> None:
        """Open the gates of an option, in place."""
        orders = [order[:n] for (order, _), n in zip(self.chains, kept, strict=True)]
        if gates.rank_gate is not None:
            gates.rank_gate[self.index, orders.pop(0)] = 1.0
        if gates.bit_gate is not None:
            for gate, order in zip(gates.bit_gate[self.index], orders, strict=True):
                gate[order] = 1.0


def better_options(costs: FloatArray, losses: FloatArray) -> NDArray[np.intp]:
    """Indices of all options that lose less than every cheaper one, by cost.

    Examples
    --------
    >>> better_options(np.array([2.0, 1.0, 3.0, 4.0]), np.array([5.0, 6.0, 5.5, 1.9]))
    array([1, 0, 3])
    """
    order = np.lexsort((losses, costs))
    least = np.minimum.accumulate(losses[order])
    return order[np.append(True, least[1:] < least[:-1])]


def lower_hull(costs: FloatArray, losses: FloatArray) -> list[int]:
    """Indices of the lower convex hull of options that get dearer and lose less.

    Examples
    --------
    >>> lower_hull(np.array([1.0, 2.0, 3.0, 4.0]), np.array([6.0, 5.0, 2.0, 1.9]))
    [0, 2, 3]
    """
    hull: list[int] = []
    for i in range(len(costs)):
        while len(hull) > 1 and _above(costs, losses, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(costs: FloatArray, losses: FloatArray, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    rise = (losses[b] - losses[a]) * (costs[c] - costs[a])
    return bool(rise >= (losses[c] - losses[a]) * (costs[b] - costs[a]))
