r"""Natural gradient ascent of the ELBO of discrete gates.

For discrete gates z_k ~ Bernoulli(p_k), p_k = sigmoid(a_k), the ELBO is

    L(p) = E[log p(y | z)] + E[log factor(z)] - KL(q || prior),

all but the divergence linear in every p_k. (The log factor is whatever else depends on the gates:
the price of bit operations, the divergence of the weights that open gates make use of.) Setting
its derivative to zero gives the optimum of one gate, the others given:

    a_k = prior_k + D_k + (1 / r_k) d E[log factor] / d p_k - K_k
    D_k = E[log p(y | z) | z_k = 1] - E[log p(y | z) | z_k = 0]        (k reached)

where r_k is the probability that gate k is reached (all before it are open) and K_k the expected
divergence of the gates behind an open gate k. The damped iteration of all these equations is
natural gradient ascent, as the Fisher information of a_k is r_k p_k (1 - p_k).

D_k is a difference of two runs of the network for every gate. But the log likelihood is smooth
along z_k from 0 to 1, so D_k is the integral of its derivative, for which Simpson's rule needs
the derivative at three points only,

    D_k ~ (m(0) + 4 m(1/2) + m(1)) / 6,     m(t) = E[d_k log p(y | z) | z_k = t],

and one backward pass at a draw of all gates gives one of the three for every gate at once. The
rule is exact where the log likelihood is a polynomial of degree four in z_k. What it needs is the
derivative itself: a straight-through gradient, as behind a quantizer, is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bayes_lora.errors import NumericalError
from bayes_lora.gates import GateStructure, nested, reach

MIDPOINTS = 0.5  # share of the rows in which one gate is at 1/2, in the draws that have such
MAX_STEP = 3.0  # nats that a logit moves at most in one iteration


@dataclass
class GateSet:
    """Gates of one kind: their posterior and prior logits, and how they follow one another.

    Attributes
    ----------
    logits : Tensor
        Posterior logits a, shape (..., K), in float64 while they are refined.
    prior_logits : Tensor
        Of the same shape.
    structure : {nested, independent}
        Whether a gate is reached only through those before it.
    bends : bool
        Whether the middle is looked at. Without, the trapezoid rule is left, which has less noise
        and is exact where the log likelihood is quadratic in every gate.
    """

    logits: Tensor
    prior_logits: Tensor
    structure: GateStructure = nested
    bends: bool = True

    def draw(
        self, draws: int, whole: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw gates in antithetic pairs, and choose which to put at 1/2; shapes (S, ..., K).

        In the first `whole` draws none is.
        """
        p = self.logits.sigmoid()
        u = torch.rand((draws // 2, *p.shape), generator=generator).to(p)
        gates = (torch.stack([u, 1 - u], 1).flatten(0, 1) < p).to(p)
        chosen = torch.randint(p.shape[-1], (*gates.shape[:-1], 1), generator=generator)
        here = torch.rand(chosen.shape, generator=generator) < MIDPOINTS
        here[: whole if self.bends else draws] = False
        middle = torch.zeros_like(gates).scatter_(-1, chosen.to(p.device), here.to(p))
        return gates, middle * reach(gates, self.structure)


class Slopes:
    """Running means of the derivative in every gate, where it was at 0, at 1/2 and at 1.

    Draws with gates at 1/2 have other means than the guide, so they only tell how much the middle
    differs from the ends: the integral is the trapezoid rule on whole draws, corrected by that.

    Parameters
    ----------
    like : Tensor
        Of the gates' shape.
    window : float
        Iterations that the means look back on.
    """

    def __init__(self, like: Tensor, window: float) -> None:
        self.window = window
        self.iterations = 0
        self.sums, self.counts = (like.new_zeros(2, 3, *like.shape) for _ in range(2))

    def add(
        self, gates: Tensor, gradients: Tensor, middle: Tensor, reached: Tensor, whole: int
    ) -> None:
        """Take in one iteration: draws, derivatives, and which count; shapes (S, ..., K)."""
        self.iterations += 1
        rate = max(1 / self.iterations, 1 / self.window)
        # beside a gate at 1/2 the others of its row are not a draw
        reached = reached * (1 - middle.amax(-1, keepdim=True))
        for point, here in enumerate((reached * (1 - gates), middle, reached * gates)):
            for part, draws in enumerate((slice(whole), slice(whole, None))):
                seen = here[draws]
                self.sums[part, point].lerp_((seen * gradients[draws]).sum(0), rate)
                self.counts[part, point].lerp_(seen.sum(0), rate)

    def integrals(self) -> Tensor:
        """D_k by Simpson's rule; where an end was not seen, from the other and the middle."""
        means = self.sums / self.counts.clamp_min(1e-12)
        seen = (self.counts > 0).to(means.dtype)
        ends, ends_seen = means[:, ::2], seen[:, ::2]
        trapezoid = (ends * ends_seen).sum(1) / ends_seen.sum(1).clamp_min(1)
        # the line through one end and the middle has its mean in the middle
        share = torch.where(ends_seen[1].sum(0) == 2, 2 / 3, 1.0) * seen[1, 1]
        same_ends = (ends_seen[0] == ends_seen[1]).all(0)
        return trapezoid[0] + share * same_ends * (means[1, 1] - trapezoid[1])


def ascend(
    log_likelihood: Callable[..., Tensor],
    log_factor: Callable[..., Tensor | None],
    sets: Sequence[GateSet],
    iterations: int,
    draws: int = 4,
    damping: float = 0.3,
    on_iteration: Callable[[float], None] = lambda log_likelihood: None,
    generator: torch.Generator | None = None,
) -> None:
    """Move the logits to the optimum of the ELBO of discrete gates, in place.

    Parameters
    ----------
    log_likelihood : function
        From one draw of every gate set to the log likelihood of the whole data set in nats, or
        an unbiased estimate from a batch, shape (), differentiable in the gates.
    log_factor : function
        From open probabilities of every gate set to the expected log factor of the prior in
        nats, shape (), or None.
    sets : sequence of GateSet
        What to refine.
    iterations : int
        Updates of all logits.
    draws : int
        Draws an iteration, in antithetic pairs: an even number.
    damping : float
        Share of the way to the optimum that an update goes.
    on_iteration : function
        Called before every update with the log likelihood in nats, the mean over draws of gates
        that are all open or closed.
    generator : torch.Generator, optional
        Draws the gates.

    Raises
    ------
    NumericalError
        If the log likelihood or its gradient is not finite.
    """
    slopes = [Slopes(gates.logits, window=max(1.0, iterations / 4)) for gates in sets]
    whole = draws - max(1, draws // 4) if any(gates.bends for gates in sets) else draws
    for _ in range(iterations):
        drawn, middle = zip(*(gates.draw(draws, whole, generator) for gates in sets), strict=True)
        points = [z.lerp(torch.full_like(z, 0.5), m) for z, m in zip(drawn, middle, strict=True)]
        values: list[float] = []
        gradients: list[list[Tensor]] = [[] for _ in sets]
        for draw in zip(*points, strict=True):
            leaves = [gates.clone().requires_grad_() for gates in draw]
            value = log_likelihood(*leaves)
            values.append(value.item())
            found = torch.autograd.grad(value, leaves)
            if not all(torch.isfinite(x).all() for x in (value, *found)):
                raise NumericalError("refinement: log likelihood, or its gradient, not finite")
            for kept, gradient in zip(gradients, found, strict=True):
                kept.append(gradient)
        on_iteration(fmean(values[:whole]))
        for gates, slope, z, m, g, factor in zip(
            sets, slopes, drawn, middle, gradients, _factor_slopes(log_factor, sets), strict=True
        ):
            slope.add(z, torch.stack(g), m, reach(z, gates.structure), whole)
            reached = reach(gates.logits.sigmoid(), gates.structure).clamp_min(1e-12)
            optimum = (
                gates.prior_logits + slope.integrals() + factor / reached - divergence(gates)[1]
            )
            gates.logits += (damping * (optimum - gates.logits)).clamp(-MAX_STEP, MAX_STEP)


def _factor_slopes(
    log_factor: Callable[..., Tensor | None], sets: Sequence[GateSet]
) -> Sequence[Tensor]:
    """Derivative of the expected log factor in every open probability."""
    probs = [gates.logits.sigmoid().requires_grad_() for gates in sets]
    factor = log_factor(*probs)
    if factor is None:
        return [torch.zeros_like(p) for p in probs]
    return torch.autograd.grad(factor, probs, materialize_grads=True)


def divergence(gates: GateSet) -> tuple[Tensor, Tensor]:
    """KL(q || prior) of discrete gates, those that are not reached at their prior; nats.

    Returns
    -------
    tuple of two Tensors
        Of all gates together, shape (); and of those behind each gate, given that it is open,
        shape (..., K).
    """
    a, p = gates.logits, gates.logits.sigmoid()
    own = p * (a - gates.prior_logits) - softplus(a) + softplus(gates.prior_logits)
    behind = torch.zeros_like(own)
    if gates.structure is nested:
        for k in range(a.shape[-1] - 2, -1, -1):
            behind[..., k] = own[..., k + 1] + p[..., k + 1] * behind[..., k + 1]
    return (reach(p, gates.structure) * own).sum(), behind
