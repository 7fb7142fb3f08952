r"""Gradients that are sums over very many rows, estimated from some of them without bias.

The gradient of the level weights pi of a frozen weight W or an input x is a sum over all
tokens t. For W it even takes the matrix product that training a frozen weight is to save:

    d loss / d pi_b = sum_t g_t . Q_b(W) x_t     or     sum_t g_t . Q_b(x_t),

g_t the gradient that comes back at token t. With n tokens drawn, with replacement, with probability
p_t proportional to |g_t|, an estimate of such a sum of v_t is

    sum_t v_t ~ 1/n sum_i v_{t_i} / p_{t_i},   variance (sum_t |v_t|^2 / p_t - |sum_t v_t|^2) / n.

So padding is never drawn, and in a last layer, of which one token a text is used, only what counts
is. A batch is itself a draw of some 32 examples out of thousands; this adds little to its noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

FEWEST, SHARE = 256, 8
"""Rows that are drawn: a share of one in eight, but of few rows all, each once."""


def number_drawn(rows: int) -> int:
    """How many of so many rows are drawn.

    Examples
    --------
    >>> number_drawn(100), number_drawn(1000), number_drawn(8000)
    (100, 256, 1000)
    """
    return min(rows, max(FEWEST, rows // SHARE))


def has_many_rows(x: Tensor) -> bool:
    """Whether a sum over the rows of (..., d) is estimated: more rows than are drawn."""
    rows = x.numel() // x.shape[-1]
    return number_drawn(rows) < rows


def sample_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Draw rows with probability proportional to the norm of their gradient.

    Parameters
    ----------
    gradient : Tensor
        Shape (T, d).

    Returns
    -------
    tuple of two Tensors
        Indices of n rows, and their gradients divided by n p, shape (n, d).
    """
    norms = gradient.float().norm(dim=-1)
    # what is not finite must go on to where training is stopped for it
    p = torch.nan_to_num(norms, nan=1.0, posinf=1.0) + torch.finfo(torch.float32).tiny
    chosen = torch.multinomial(p, number_drawn(len(p)), replacement=True)
    weight = p.sum() / (len(chosen) * p[chosen])
    # not the factor itself in half precision, where that of a rare row may be too large
    return chosen, (gradient[chosen] * weight[:, None]).to(gradient.dtype)


def linear_of_mixture(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear map by a weight that is quantized with gates; their gradient is an estimate.

    Parameters
    ----------
    x : Tensor
        Shape (..., in).
    weight : Tensor
        Shape (out, in). Where it needs no gradient, or of few rows, this is plain `linear`.
    bias : Tensor or None
        Shape (out,), frozen.
    """
    if not (weight.requires_grad and has_many_rows(x)):
        return linear(x, weight, bias)
    output = linear(x, weight.detach(), bias)
    return _WeightGradient.apply(output, x.detach(), weight)


class _WeightGradient(torch.autograd.Function):
    """The identity in the output; gives the weight an estimate of its gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (autograd's context has no type)
        output: Tensor,
        x: Tensor,
        weight: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = weight.dtype
        return output.view_as(output)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *gradients: Tensor,
    ) -> tuple[Tensor, None, Tensor]:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        chosen, of_rows = sample_rows(gradient.flatten(0, -2))
        drawn = x.flatten(0, -2)[chosen].to(of_rows.dtype)
        return gradient, None, (of_rows.T @ drawn).to(ctx.dtype)
