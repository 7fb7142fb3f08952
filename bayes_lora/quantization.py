r"""Quantizers of b bits, and their gated mixture with a straight-through gradient.

A symmetric quantizer of b bits with range r has the grid of 2^b - 1 points

    Q_b(x) = s clamp(round(x / s), -n, n),   s = 2 r / (2^b - 1),   n = 2^(b-1) - 1,

which every finer grid of the same range contains. The gates of a tensor mix its levels,

    Q(x) = sum_b pi_b Q_b(x),

with the level weights pi of `bayes_lora.gates.level_weights`. With one range for all levels
this equals, exactly, the residual recursion x2 + z4 (e4 + z8 (e8 + ...)) of Bayesian Bits; the
mixture also allows every level a range of its own, and a coarse grid wants a smaller one (on
activations of a pretrained encoder, with outliers 10 to 90 times the root mean square, the
range of least squared error has 3 to 6 times less error at 4 bits than the largest value).

A level of weight zero need not be computed, in value or gradient: hard concrete gates reach 0
and 1 exactly, with zero gradient there. The gradient in x is straight through inside each
level's range, sum_b pi_b 1[|x| <= r_b].

Source: van Baalen et al., "Bayesian Bits", arXiv 2005.07093.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

GAUSSIAN_RANGE = {2: 1.84, 4: 2.65, 8: 3.93}
"""Range of least squared error of `quantize` for a standard normal variable, by bits."""


_EDGE = 1.0 + 1e-6


class Mixture(NamedTuple):
    """How one tensor is quantized: the weights of its levels and which of them count.

    Attributes
    ----------
    weights : Tensor
        Level weights pi, shape (K + 1,), summing to one.
    active : tuple of int
        Indices of the levels of weight > 0, known on the host.
    differentiated : tuple of int, optional
        Indices of the levels whose weight gets a gradient. Default: the active ones, if there
        are several. (A hard concrete gate at exactly 0 or 1 has no gradient.)
    """

    weights: Tensor
    active: tuple[int, ...]
    differentiated: tuple[int, ...] | None = None


def largest_integer(bits: int) -> int:
    """Largest grid index of a symmetric quantizer: 2^(bits - 1) - 1."""
    return 2 ** (bits - 1) - 1


def quantize(x: Tensor, limit: Tensor, bits: int) -> Tensor:
    """Round to the symmetric grid of 2^bits - 1 points inside [-limit, limit].

    Parameters
    ----------
    x : Tensor
        Any shape.
    limit : Tensor
        Range r of the grid, > 0, broadcastable to `x`.
    bits : int
        Width of the grid; 2, 4, 8 or 16. 32 bits leave `x` as it is.

    Returns
    -------
    Tensor
        Values on the grid, shape and type of `x`.

    Examples
    --------
    >>> import torch
    >>> quantize(torch.tensor([-2.0, 0.1, 0.4, 0.9]), torch.tensor(1.5), bits=2)
    tensor([-1.,  0.,  0.,  1.])
    """
    if bits >= 32:
        return x.clone()
    # half precision has neither the integers of a 16-bit grid nor its small steps
    wide = x if x.dtype == torch.float64 else x.float()
    step = limit.to(wide.dtype) * (2 / (2**bits - 1))
    largest = largest_integer(bits)
    return (wide / step).round_().clamp_(-largest, largest).mul_(step).to(x.dtype)


class _Mixed(torch.autograd.Function):
    """sum_b weights_b quantize(x, limits_b, bits_b), straight through inside each range."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (autograd's context has no type)
        x: Tensor,
        weights: Tensor,
        limits: Tensor,
        active: tuple[int, ...],
        differentiated: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weights, limits)
        ctx.active, ctx.differentiated = active, differentiated
        if len(active) == 1:
            return quantize(x, limits[active[0]], 2 ** (active[0] + 1))
        total = torch.zeros_like(x)
        for level in active:
            total += quantize(x, limits[level], 2 ** (level + 1)).mul_(weights[level])
        return total

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *gradients: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        x, weights, limits = ctx.saved_tensors
        x_gradient = weights_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = torch.zeros_like(gradient) if len(ctx.active) > 1 else None
            for level in ctx.active:
                # one fused pass: the gradient where |x| <= limit, and the largest value, whose
                # ratio is 1 but for rounding, must be inside or it could never move
                inside = torch.ops.aten.hardtanh_backward(
                    gradient, x / limits[level].to(x.dtype), -_EDGE, _EDGE
                )
                if x_gradient is None:
                    x_gradient = inside
                else:
                    x_gradient += inside.mul_(weights[level])
        if ctx.needs_input_grad[1]:
            weights_gradient = torch.zeros_like(weights)
            for level in ctx.differentiated:
                value = quantize(x, limits[level], 2 ** (level + 1))
                weights_gradient[level] = (gradient * value).sum()
        return x_gradient, weights_gradient, None, None, None


def quantize_mixture(x: Tensor, limits: Tensor, mixture: Mixture) -> Tensor:
    """Quantize to a mixture of levels, with a gradient in `x` and in the level weights.

    Parameters
    ----------
    x : Tensor
        Any shape.
    limits : Tensor
        Range of every level, shape (K + 1, ...) with the rest broadcastable to `x`. Ranges are
        constants: no gradient reaches them.
    mixture : Mixture
        Level weights, and the indices of those > 0. With one active level nothing is
        differentiated with respect to the weights, so a frozen `x` costs no backward pass.

    Returns
    -------
    Tensor
        sum_b pi_b Q_b(x), shape and type of `x`.

    Examples
    --------
    >>> import torch
    >>> weights = torch.tensor([0.25, 0.75])
    >>> quantize_mixture(torch.tensor([0.3]), torch.ones(2), Mixture(weights, (0, 1)))
    tensor([0.2000])
    """
    weights, active, differentiated = mixture
    if differentiated is None:
        differentiated = active if len(active) > 1 else ()
    if not differentiated:
        weights = weights.detach()
    return _Mixed.apply(x, weights, limits, active, differentiated)


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
