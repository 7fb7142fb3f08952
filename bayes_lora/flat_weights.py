r"""The flat vector of adapter weights: A, e and B of every layer, one after the other.

For layers of sizes in_l and out_l and rank R, the vector has length

    P = sum_l R (in_l + 1 + out_l),

and holds, layer by layer, A (R, in_l), e (R,) and B (out_l, R), each row by row. One long
vector is one sample site with one KL, and one tensor for the optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bayes_lora.targets import LayerSpec

SCALE_OF_A, SCALE_OF_B = 0.05, 0.002
"""Initial standard deviations; with 0.03 for both, LoRA on MRPC lost two points of accuracy."""


def initial_weights(
    specs: Sequence[LayerSpec], rank: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw A as LoRA does (uniform within 1 / sqrt(in)); e is one and B is zero.

    Returns
    -------
    Tensor
        The flat vector, shape (P,): the adapted network then equals the pretrained one.

    Examples
    --------
    >>> initial_weights([LayerSpec("query", 4, 3)], rank=2)[8:]  # e and B
    tensor([1., 1., 0., 0., 0., 0., 0., 0.])
    """
    parts: list[Tensor] = []
    for spec in specs:
        A = torch.rand(rank, spec.in_features, generator=generator)
        parts += [(2 * A - 1).flatten() / math.sqrt(spec.in_features)]
        parts += [torch.ones(rank), torch.zeros(spec.out_features * rank)]
    return torch.cat(parts)


def initial_scales(specs: Sequence[LayerSpec], rank: int) -> Tensor:
    """Standard deviations that a normal posterior of the weights starts from.

    A and e start uncertain; B, which starts at zero, nearly certain. So the network does at first
    what the pretrained one does, whatever A is; what it learns in B lets the noise of A through.

    Returns
    -------
    Tensor
        Shape (P,), > 0.

    References
    ----------
    Wang et al., "BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language
    Models", arXiv 2406.11675, where A alone is random.

    Examples
    --------
    >>> initial_scales([LayerSpec("query", 3, 2)], rank=1)  # A, e, B
    tensor([0.0500, 0.0500, 0.0500, 0.0500, 0.0020, 0.0020])
    """
    parts: list[Tensor] = []
    for spec in specs:
        parts += [torch.full(((spec.in_features + 1) * rank,), SCALE_OF_A)]
        parts += [torch.full((spec.out_features * rank,), SCALE_OF_B)]
    return torch.cat(parts)


def split_weights(
    weights: Tensor, specs: Sequence[LayerSpec], rank: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Views of A (R, in), e (R,) and B (out, R) of every layer in the flat vector (P,).

    Examples
    --------
    >>> A, e, B = split_weights(torch.arange(8), [LayerSpec("query", 2, 1)], rank=2)[0]
    >>> A.tolist(), e.tolist(), B.tolist()
    ([[0, 1], [2, 3]], [4, 5], [[6, 7]])
    """
    sizes = [rank * n for spec in specs for n in (spec.in_features, 1, spec.out_features)]
    flat = iter(weights.split(sizes))
    return [(next(flat).view(rank, -1), next(flat), next(flat).view(-1, rank)) for _ in specs]


def component_of_weight(specs: Sequence[LayerSpec], rank: int) -> Tensor:
    """Index, in the flattened (L, R), of the component that every weight is of: shape (P,).

    Examples
    --------
    >>> component_of_weight([LayerSpec("query", 2, 1)], rank=2)  # A (2, 2), e (2,), B (1, 2)
    tensor([0, 0, 1, 1, 0, 1, 0, 1])
    """
    parts: list[Tensor] = []
    for layer, spec in enumerate(specs):
        components = torch.arange(rank) + layer * rank
        A = components[:, None].expand(-1, spec.in_features)
        B = components.expand(spec.out_features, -1)
        parts += [A.flatten(), components, B.flatten()]
    return torch.cat(parts)


def weight_coordinates(specs: Sequence[LayerSpec], rank: int) -> dict[str, np.ndarray]:
    """Layer, tensor and component (from 1) that every weight is of, each of shape (P,).

    Examples
    --------
    >>> found = weight_coordinates([LayerSpec("query", 2, 1)], rank=2)
    >>> found["weight_tensor"].tolist(), found["weight_component"].tolist()
    (['A', 'A', 'A', 'A', 'e', 'e', 'B', 'B'], [1, 1, 2, 2, 1, 2, 1, 2])
    """
    sizes = [rank * n for spec in specs for n in (spec.in_features, 1, spec.out_features)]
    component = component_of_weight(specs, rank).numpy()
    return {
        "weight_layer": np.array([spec.path for spec in specs], dtype=object)[component // rank],
        "weight_tensor": np.repeat(np.array(["A", "e", "B"] * len(specs), dtype=object), sizes),
        "weight_component": component % rank + 1,
    }
