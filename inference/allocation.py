r"""Allocate ranks and bits under a budget, by what the posterior says that each is worth.

What the data say of a gate is the difference between its logit and the one it would have without
data (`BayesianLoRA.logits_without_data`). For gates that follow one another, the optimum of the
ELBO (`natural_gradient.py`) gives

    D_k = a_k - a_k(without data) + K_k,          delta_k = D_k - p_{k+1} D_{k+1},

where K_k is the expected divergence of the gates behind gate k (only in the ELBO of discrete gates:
the relaxed one counts the divergence of every gate, reached or not), D_k the log likelihood that is
gained by opening it with those behind it as they come, and delta_k what going from k - 1 to k
components, or levels, gains; nats. A decision's expected loss is the sum of the delta it gives up.

Costs of a layer depend on its own rank and bits alone. So every layer has a lower convex hull of
loss against cost; the steps of all hulls, in the order of what they gain per unit of cost, pass
through decisions of which each has the least loss at its cost. A budget takes as many steps as it
pays for, so a tighter one never uses more.

Source: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE
Transactions on Acoustics, Speech, and Signal Processing 36 (1988).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_lora.costs import FULL_BITS
from bayes_lora.errors import InputError
from bayes_lora.gates import GateStructure, nested
from bayes_lora.inference.natural_gradient import GateSet, divergence
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
    return rows * columns * bits["weight"] * bits["input"] + rank * adapter


def layer_bytes(spec: LayerSpec, rank: FloatArray, bits: dict[str, FloatArray]) -> FloatArray:
    """Bytes of A, e and B, as `costs.adapter_bytes` counts them."""
    entries = spec.in_features * bits["A"] + bits["e"] + spec.out_features * bits["B"]
    return rank * entries / 8


def gains(
    logits: Gates, without_data: Gates, priors: Gates | None, structure: GateStructure
) -> Gates:
    """Log likelihood that each further component and level gains, delta_k above; nats.

    Parameters
    ----------
    logits, without_data : Gates
        Posterior logits, and those without data; shapes of the gates.
    priors : Gates, optional
        Prior logits without any factor, if the posterior is that of discrete gates.
    structure : {nested, independent}
        Of the rank gates.
    """
    found: list[Tensor | None] = []
    for *each, order in zip(
        logits, without_data, priors or logits, (structure, nested), strict=True
    ):
        if each[0] is None:
            found.append(None)
            continue
        a, without, prior = (cast(Tensor, x).detach().double() for x in each)
        D = a - without
        if priors is not None:
            D += divergence(GateSet(a, prior, order))[1]
        if order is nested:
            D[..., :-1] -= a.sigmoid()[..., 1:] * D[..., 1:].clone()
        found.append(D)
    return Gates(*found)


class _Step(NamedTuple):
    """One step up the hull of a layer: what it gains per unit of cost, and what it adds."""

    slope: float
    layer: int
    kept: tuple[int, ...]
    cost: float
    loss: float


def allocate(
    network: AdaptedNetwork, decided: Gates, worth: Gates, cost: Cost, budget: float
) -> tuple[Gates, float]:
    """Choose ranks and bits of least expected loss whose cost is within a budget.

    Parameters
    ----------
    network : AdaptedNetwork
        Its layers and their sizes.
    decided : Gates
        0 or 1, shapes (L, R) and (L, T, K): nothing that is closed here is opened.
    worth : Gates
        As of `gains`, same shapes.
    cost : function
        `layer_bops` or `layer_bytes`, summed over the adapted layers.
    budget : float
        In the unit of `cost`.

    Returns
    -------
    tuple of Gates and float
        What is chosen, and how much log likelihood it is expected to lose against `decided`, nats.
        If `decided` is within the budget, that, and 0.

    Raises
    ------
    InputError
        If the budget is below what is left with every gate closed.
    """
    layers = [_Layer(network, decided, worth, index) for index in range(len(network.specs))]
    steps: list[_Step] = []
    kept: list[tuple[int, ...]] = []
    spent = loss = whole = 0.0
    for index, (layer, spec) in enumerate(zip(layers, network.specs, strict=True)):
        costs, losses = layer.options(spec, cost)
        hull = [np.unravel_index(i, costs.shape) for i in lower_hull(costs.ravel(), losses.ravel())]
        places = [tuple(map(int, place)) for place in hull]
        kept.append(places[0])
        spent, loss = spent + costs[places[0]], loss + losses[places[0]]
        whole += costs.ravel()[-1]  # with everything kept
        for before, after in pairwise(places):
            added, less = costs[after] - costs[before], losses[after] - losses[before]
            steps.append(_Step(-less / added, index, after, added, less))
    if whole <= budget:
        return decided, 0.0
    if spent > budget:
        raise InputError(
            f"the budget pays for {budget / spent:.1%} of what is left with every gate closed"
        )
    for step in sorted(steps, key=lambda step: (-step.slope, step.layer)):
        if spent + step.cost > budget:
            break
        spent, loss = spent + step.cost, loss + step.loss
        kept[step.layer] = step.kept
    closed = decided.map(torch.zeros_like)
    for layer, chosen in zip(layers, kept, strict=True):
        layer.open(closed, chosen)
    return closed, float(loss)


class _Layer:
    """What of one layer may be kept: leading components and levels of what is decided.

    An option is a tuple: how many components, and how many levels of every tensor that has gates.
    """

    def __init__(self, network: AdaptedNetwork, decided: Gates, worth: Gates, index: int) -> None:
        self.index = index
        self.tensors = network.quantized_tensors if decided.bit_gate is not None else ()
        self.chains: list[
            tuple[Tensor, FloatArray]
        ] = []  # gates in order of being kept, their worth
        for gate, gain in zip(decided, worth, strict=True):
            if gate is None or gain is None:
                continue
            on = (
                network.structure(gate[index]) if gate is decided.rank_gate else nested(gate[index])
            )
            for mine, value in zip(
                on.view(-1, on.shape[-1]), gain[index].view(-1, on.shape[-1]), strict=True
            ):
                order = mine.nonzero().flatten()
                if gate is decided.rank_gate and network.structure is not nested:
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


def lower_hull(costs: FloatArray, losses: FloatArray) -> list[int]:
    """Indices of the lower convex hull of loss against cost, from the cheapest to the least loss.

    Examples
    --------
    >>> lower_hull(np.array([2.0, 1.0, 3.0, 4.0, 4.0]), np.array([5.0, 6.0, 2.0, 1.9, 7.0]))
    [1, 2, 3]
    """
    order = np.lexsort((losses, costs))
    least = np.minimum.accumulate(losses[order])
    better = np.append(True, least[1:] < least[:-1])  # than all that is cheaper
    hull: list[int] = []
    for i in order[better].tolist():
        while len(hull) > 1 and _above(costs, losses, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(costs: FloatArray, losses: FloatArray, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    rise = (losses[b] - losses[a]) * (costs[c] - costs[a])
    return bool(rise >= (losses[c] - losses[a]) * (costs[b] - costs[a]))
