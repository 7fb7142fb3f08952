r"""Quantizers of b bits, and their gated mixture with a straight-through gradient.

A symmetric quantizer of b bits with range r has the grid of 2^b - 1 points

    Q_b(x) = s clamp(round(x / s), -n, n),   s = 2 r / (2^b - 1),   n = 2^(b-1) - 1,

which every finer grid of the same range contains. The gates of a tensor mix its levels,

    Q(x) = sum_b pi_b Q_b(x),

with the level weights pi of `bayes_lora.gates.level_weights`. With one range for all levels
this equals, exactly, the residual recursion x2 + z4 (e4 + z8 (e8 + ...)) of Bayesian Bits; the
mixture also allows every level a range of its own (`ranges`).

A level of weight zero need not be computed, in value or gradient: hard concrete gates reach 0
and 1 exactly, with zero gradient there. The gradient in x is straight through inside each
level's range, sum_b pi_b 1[|x| <= r_b].

Source: van Baalen et al., "Bayesian Bits", arXiv 2005.07093.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bayes_lora.row_sample import has_many_rows, sample_rows

_EDGE = 1.0 + 1e-6


class Mixture(NamedTuple):
    """How one tensor is quantized: the weights of its levels and which of them count.

    Attributes
    ----------
    weights : Tensor
        Level weights pi, shape (K + 1,), summing to one; of a stack of L tensors, each with
        weights of its own, shape (K + 1, L, 1, ...), which broadcasts.
    active : tuple of int
        Indices of the levels of weight > 0, in any tensor of the stack; known on the host.
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
    codes, step = _codes(_wide(x), limit, bits)
    return codes.mul_(step).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Half precision has neither the integers of a 16-bit grid nor its small steps."""
    return x if x.dtype == torch.float64 else x.float()


def _codes(wide: Tensor, limit: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers of the grid points next to the values, and the step between two points."""
    step = limit.to(wide.dtype) * (2 / (2**bits - 1))
    largest = largest_integer(bits)
    return (wide / step).round_().clamp_(-largest, largest), step


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
        estimated: bool,
        numbers: tuple[float, ...] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weights, limits)
        ctx.active, ctx.differentiated, ctx.estimated = active, differentiated, estimated
        ctx.numbers = numbers
        if len(active) == 1:
            return quantize(x, limits[active[0]], 2 ** (active[0] + 1))
        wide = _wide(x)
        total: Tensor | None = None
        for level in active:
            codes, step = _codes(wide, limits[level], 2 ** (level + 1))
            scale = step * weights[level].to(step.dtype)
            total = codes.mul_(scale) if total is None else total.addcmul_(codes, scale)
        return cast(Tensor, total).to(x.dtype)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *gradients: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        (gradient,) = gradients
        x, weights, limits = ctx.saved_tensors
        x_gradient = weights_gradient = None
        if ctx.needs_input_grad[0]:
            for level in ctx.active:
                # one fused pass: the gradient where |x| <= limit; a ratio that rounding takes
                # beyond 1 is inside
                ratio, end = (
                    (x / limits[level].to(x.dtype), _EDGE)
                    if ctx.numbers is None
                    else (x, ctx.numbers[level] * _EDGE)
                )
                inside = torch.ops.aten.hardtanh_backward(gradient, ratio, -end, end)
                if len(ctx.active) == 1:
                    x_gradient = inside
                elif x_gradient is None:
                    x_gradient = inside.mul_(weights[level])
                else:
                    x_gradient.addcmul_(inside, weights[level].to(inside.dtype))
        if ctx.needs_input_grad[1]:
            weights_gradient = torch.zeros_like(weights)
            if ctx.estimated:
                chosen, gradient = sample_rows(gradient.flatten(0, -2))
                x = x.flatten(0, -2)[chosen]
            wide, coming = _wide(x), _wide(gradient)
            for level in ctx.differentiated:
                codes, step = _codes(wide, limits[level], 2 ** (level + 1))
                values, pi = codes.mul_(step), weights[level]
                weights_gradient[level] = (
                    (values.mul_(coming)).sum_to_size(pi.shape)
                    if pi.ndim
                    else torch.dot(values.flatten(), coming.flatten())
                )
        return x_gradient, weights_gradient, None, None, None, None, None


def quantize_mixture(
    x: Tensor,
    limits: Tensor,
    mixture: Mixture,
    estimated: bool = False,
    numbers: tuple[float, ...] | None = None,
) -> Tensor:
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
    estimated : bool
        Estimate the gradient of the level weights from a sample of rows (`row_sample`), if there
        are many; the range must be one for all.
    numbers : tuple of float, optional
        The same ranges, shape (K + 1,), where the host knows them: the backward pass then needs
        no temporary tensor.

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
    estimated = estimated and has_many_rows(x)
    return _Mixed.apply(x, weights, limits, active, differentiated, estimated, numbers)
