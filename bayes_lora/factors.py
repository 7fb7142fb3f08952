r"""The adapters' A, e and B, quantized: those of all layers that have one shape at once.

They are many and small, so what they take is not arithmetic but the number of operations. Tensors
X_l of one shape, each with level weights and ranges of its own, are one stack:

    Q(X)_l = sum_b pi_{l,b} Q_b(X_l),

where a level that any tensor of the stack needs is computed for all of them; what its weight of
zero adds is zero, in value and in gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayes_lora.quantization import Mixture, quantize_mixture
from bayes_lora.ranges import gaussian_limits

Factors = tuple[Tensor, Tensor, Tensor]
"""A (R, in), e (R,) and B (out, R) of one layer."""

DIMS = {"A": -1, "e": -1, "B": -2}
"""The dimension that shares one range: a range for every component of A and B, one for e."""


def quantize_factors(
    factors: Sequence[Factors], mixtures: Sequence[Mapping[str, Mixture]], bits: Sequence[int]
) -> list[Factors]:
    """Quantize A, e and B of every layer at its own mixture of levels.

    Parameters
    ----------
    factors : sequence of (Tensor, Tensor, Tensor)
        A, e and B of every layer.
    mixtures : sequence of mapping of str to Mixture
        Of every layer, by tensor; all have the same ones. What is absent is left as it is.
    bits : sequence of int
        The levels.

    Returns
    -------
    list of (Tensor, Tensor, Tensor)
        In the order of the layers.

    Examples
    --------
    >>> A, e, B = torch.tensor([[0.3, -0.9]]), torch.ones(1), torch.ones(1, 1)
    >>> two_bits = Mixture(torch.tensor([1.0, 0.0]), (0,))
    >>> quantize_factors([(A, e, B)], [{"A": two_bits}], (2, 4))[0][0].round(decimals=4)
    tensor([[ 0.0000, -0.8229]])
    """
    columns = []
    for (name, dim), values in zip(DIMS.items(), zip(*factors, strict=True), strict=True):
        if name not in mixtures[0]:
            columns.append(values)
            continue
        found = list(values)
        for layers in _of_one_shape(values):
            stack = torch.stack([values[layer] for layer in layers])
            limits = gaussian_limits(stack, (dim,), bits)
            mixture = _stacked([mixtures[layer][name] for layer in layers], stack.ndim)
            quantized = quantize_mixture(stack, limits, mixture).unbind()
            for layer, value in zip(layers, quantized, strict=True):
                found[layer] = value
        columns.append(tuple(found))
    return list(zip(*columns, strict=True))


def _of_one_shape(values: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors, those of one shape together."""
    places: dict[torch.Size, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value.shape, []).append(place)
    return list(places.values())


def _stacked(mixtures: Sequence[Mixture], ndim: int) -> Mixture:
    """The mixture of a stack, whose weights broadcast to `ndim` dimensions."""
    weights = torch.stack([mixture.weights for mixture in mixtures], dim=1)
    differentiated = {level for m in mixtures for level in m.differentiated or ()}
    return Mixture(
        weights.view(*weights.shape, *[1] * (ndim - 1)),
        tuple(sorted({level for m in mixtures for level in m.active})),
        tuple(sorted(differentiated)) or None,
    )
