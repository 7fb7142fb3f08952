r"""Ranges of the quantizers: of every level its own, the one of least squared error.

A coarse grid wants a smaller range than a fine one. On activations of a pretrained encoder, with
outliers 10 to 90 times the root mean square, the range of least squared error has 3 to 6 times
less error at 4 bits than the largest value. It is searched for where values are fixed, or sampled
once (frozen weights, activations), and follows from the root mean square where they change with
every step (A, e and B), as if they were normal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_lora.quantization import quantize

GAUSSIAN_RANGE = {2: 1.84, 4: 2.65, 8: 3.93}
"""Range of least squared error of `quantize` for a standard normal variable, by bits."""


def largest_value(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Largest absolute value over `dims` (kept, of size one), never zero.

    Examples
    --------
    >>> import torch
    >>> largest_value(torch.tensor([[1.0, -3.0], [0.5, 0.25]]), (1,))
    tensor([[3.0000],
            [0.5000]])
    """
    return x.abs().amax(tuple(dims), keepdim=True).clamp_min(1e-8)


def covering_share(bits: int) -> float:
    """Range of the grid whose topmost point is 1: (2^bits - 1) / (2^bits - 2).

    Examples
    --------
    >>> covering_share(2)
    1.5
    """
    return (2**bits - 1) / (2**bits - 2)


@torch.no_grad()
def searched_limits(
    x: Tensor, dims: Sequence[int], bits: Sequence[int], largest: Tensor | None = None
) -> Tensor:
    """Range of least squared error for every level, by search over shares of the largest value.

    The shares are 21 points from 1 down to 1/32 in equal ratios, and the one with which the
    largest value is the topmost grid point: so values that lie on a grid of b bits are kept.

    Parameters
    ----------
    x : Tensor
        Values that the range is chosen for: a frozen weight, or a sample of activations.
    dims : sequence of int
        Dimensions that share one range.
    bits : sequence of int
        The levels.
    largest : Tensor, optional
        Largest absolute value, size one along `dims`, where `x` is only a sample; default: that
        of `x`.

    Returns
    -------
    Tensor
        Ranges, shape (len(bits), ...) with size one along `dims`. From 16 bits on there is room
        for twice the largest value, as that of a sample is no bound.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    >>> 2.4 < float(searched_limits(x, (0,), (4,))) < 2.9
    True
    """
    if largest is None:
        largest = largest_value(x, dims)
    limits = []
    for b in bits:
        best, least = 2 * largest, torch.full_like(largest, torch.inf)
        shares = [covering_share(b), *torch.logspace(0, -5, 21, base=2).tolist()]
        for share in shares if b < 16 else []:
            error = (quantize(x, share * largest, b) - x).square_().mean(tuple(dims), keepdim=True)
            best = torch.where(error < least, share * largest, best)
            least = torch.minimum(error, least)
        limits.append(best)
    return torch.stack(limits)


@torch.no_grad()
def gaussian_limits(x: Tensor, dims: Sequence[int], bits: Sequence[int]) -> Tensor:
    """Range of every level for values that change with every step, as if they were normal.

    Parameters
    ----------
    x : Tensor
        Values that are about to be quantized: adapter weights.
    dims : sequence of int
        Dimensions that share one range.
    bits : sequence of int
        The levels.

    Returns
    -------
    Tensor
        `GAUSSIAN_RANGE` times root mean square, or the range whose topmost grid point is the
        largest value, if that is smaller or the grid has 16 bits. Shape (len(bits), ...) with
        size one along `dims`.
    """
    largest = largest_value(x, dims)
    rms = x.square().mean(tuple(dims), keepdim=True).sqrt()
    limits = []
    for b in bits:
        covering = covering_share(b) * largest
        normal = GAUSSIAN_RANGE[b] * rms if b in GAUSSIAN_RANGE else covering
        limits.append(torch.minimum(covering, normal))
    return torch.stack(limits).clamp_min(1e-8)
