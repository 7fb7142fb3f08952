r"""From gates to rank and bits: nested gates, level weights, and their exact distributions.

Rank gates z_1 ... z_R of a layer weigh the components of its adapter. Nested gates,

    g_k = z_1 z_2 ... z_k,

make the components ordered: a component is reached only when all before it are open, so the
rank, the number of leading open gates, is well defined. Independent gates, g = z, are the
alternative; their rank is the number of open gates.

Bit gates z_1 ... z_K of a tensor decide level by level whether it goes from 2^k to 2^(k+1)
bits. The same leading-gate rule turns them into weights of the levels 2, 4, 8, ... bits:

    pi_0 = 1 - z_1,   pi_k = z_1 ... z_k (1 - z_{k+1}),   pi_K = z_1 ... z_K.

This map is stick-breaking. Applied to gates it gives mixture weights; applied to the gates'
open probabilities, which are independent in the guide, it gives the exact probability of
every rank and of every bit width.

Sources: Louizos, Welling, Kingma, arXiv 1712.01312; van Baalen et al., arXiv 2005.07093.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GateStructure = Callable[[Tensor], Tensor]
"""`nested` or `independent`: from rank gates (..., R) to component weights (..., R)."""


def nested(gates: Tensor) -> Tensor:
    """Weigh component k by the product of the gates 1 ... k, so that components are ordered.

    Parameters
    ----------
    gates : Tensor
        Rank gates in [0, 1], shape (..., R).

    Returns
    -------
    Tensor
        Component weights g_k = z_1 ... z_k, shape (..., R).

    Examples
    --------
    >>> import torch
    >>> nested(torch.tensor([1.0, 0.5, 0.0, 1.0]))
    tensor([1.0000, 0.5000, 0.0000, 0.0000])
    """
    return torch.cumprod(gates, dim=-1)


def independent(gates: Tensor) -> Tensor:
    """Weigh every component by its own gate.

    Parameters
    ----------
    gates : Tensor
        Rank gates in [0, 1], shape (..., R).

    Returns
    -------
    Tensor
        The gates themselves, shape (..., R).
    """
    return gates


STRUCTURES: dict[str, GateStructure] = {"nested": nested, "independent": independent}
"""The structures by name."""


def reach(gates: Tensor, structure: GateStructure = nested) -> Tensor:
    """Whether a gate is reached, or the probability of it: all nested gates before it are open.

    Parameters
    ----------
    gates : Tensor
        Gates of 0 and 1, or open probabilities of independent gates, shape (..., K).
    structure : {nested, independent}
        Independent gates are always reached.

    Returns
    -------
    Tensor
        Shape (..., K).

    Examples
    --------
    >>> import torch
    >>> reach(torch.tensor([0.5, 0.5, 0.1]))
    tensor([1.0000, 0.5000, 0.2500])
    """
    one = torch.ones_like(gates[..., :1])
    if structure is nested:
        return torch.cat([one, gates[..., :-1].cumprod(-1)], dim=-1)
    return torch.ones_like(gates)


def level_weights(gates: Tensor) -> Tensor:
    """Break a stick of length one at every gate; piece k is what stops before gate k + 1.

    Parameters
    ----------
    gates : Tensor
        Bit gates in [0, 1], or open probabilities of independent gates, shape (..., K).

    Returns
    -------
    Tensor
        Weights that sum to one, shape (..., K + 1): of the levels 2, 4, ..., 2^(K+1) bits,
        or, for probabilities, P(number of leading open gates = 0 ... K).

    Examples
    --------
    >>> import torch
    >>> level_weights(torch.tensor([1.0, 0.25, 0.5]))
    tensor([0.0000, 0.7500, 0.1250, 0.1250])
    """
    reached = torch.cumprod(gates, dim=-1)
    one = torch.ones_like(gates[..., :1])
    return torch.cat([one, reached], dim=-1) * torch.cat([1 - gates, one], dim=-1)


def rank_probabilities(probs: Tensor, structure: GateStructure = nested) -> Tensor:
    """Exact distribution of the rank when gates are open independently.

    Parameters
    ----------
    probs : Tensor
        P(gate is open), a probability, shape (..., R).
    structure : {nested, independent}
        Nested gates: rank is the number of leading open gates. Independent gates: it is the
        number of open gates, and its distribution the Poisson binomial one.

    Returns
    -------
    Tensor
        P(rank = 0 ... R), shape (..., R + 1).

    Examples
    --------
    >>> import torch
    >>> rank_probabilities(torch.tensor([0.9, 0.5]))
    tensor([0.1000, 0.4500, 0.4500])
    >>> rank_probabilities(torch.tensor([0.9, 0.5]), independent)
    tensor([0.0500, 0.5000, 0.4500])
    """
    if structure is nested:
        return level_weights(probs)
    weights = torch.cat([torch.ones_like(probs[..., :1]), torch.zeros_like(probs)], dim=-1)
    for p in probs.split(1, dim=-1):
        one_more = torch.cat([torch.zeros_like(p), weights[..., :-1]], dim=-1)
        weights = (1 - p) * weights + p * one_more
    return weights


def level_bits(num_levels: int) -> tuple[int, ...]:
    """Bit widths of the levels that `num_levels` gates choose from: 2, 4, ..., 2^(K+1).

    Examples
    --------
    >>> level_bits(3)
    (2, 4, 8, 16)
    """
    return tuple(2 ** (k + 1) for k in range(num_levels + 1))


def expected_bits(gates: Tensor) -> Tensor:
    """Mean bit width under the level weights.

    Parameters
    ----------
    gates : Tensor
        Bit gates in [0, 1], or open probabilities, shape (..., K).

    Returns
    -------
    Tensor
        Bits, shape (...).

    Examples
    --------
    >>> import torch
    >>> expected_bits(torch.tensor([1.0, 0.5, 0.0]))
    tensor(6.)
    """
    weights = level_weights(gates)
    # `level_bits`, made on the device; a sum, as autocast would have a matrix product in 16 bits
    return (weights * 2 ** torch.arange(1, weights.shape[-1] + 1, device=gates.device)).sum(-1)
