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
derivative itself: a straight-through gradient, as behind a quantizer, is none. How the means m(t)
are kept, with a data set too large for every draw to see all of it: `slopes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bayes_lora.errors import NumericalError
from bayes_lora.gates import GateStructure, nested, reach
from bayes_lora.inference.slopes import Slopes

MIDPOINTS = 0.5  # share of the rows in which one gate, if it is even, is at 1/2 in such a draw
WINDOW = 0.25  # share of the draws that means look back on
MAX_STEP = 3.0  # nats that a logit moves at most in one iteration
CERTAIN = 15.0  # nats: a gate of this logit is drawn alike some million times


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

        In the first `whole` draws none is, in the others the more the less certain a gate is.
        """
        p = self.logits.sigmoid()
        u = torch.rand((draws // 2, *p.shape), generator=generator).to(p)
        gates = (torch.stack([u, 1 - u], 1).flatten(0, 1) < p).to(p)
        chosen = torch.randint(p.shape[-1], (*gates.shape[:-1], 1), generator=generator)
        # a gate that is certain would be where no draw is, and all others beside it
        even = 4 * (p * (1 - p)).expand(gates.shape).gather(-1, chosen.to(p.device))
        here = torch.rand(chosen.shape, generator=generator).to(p) < MIDPOINTS * even
        here[: whole if self.bends else draws] = False
        middle = torch.zeros_like(gates).scatter_(-1, chosen.to(p.device), here.to(p))
        return gates, middle * reach(gates, self.structure)


def ascend(
    log_likelihood: Callable[..., Tensor],
    log_factor: Callable[..., Tensor | None],
    sets: Sequence[GateSet],
    iterations: int,
    draws: int = 4,
    parts: int = 1,
    damping: float = 0.3,
    on_iteration: Callable[[float], None] = lambda log_likelihood: None,
    generator: torch.Generator | None = None,
    after: Mapping[str, Tensor] | None = None,
    keep: Callable[[dict[str, Tensor]], None] = lambda state: None,
) -> None:
    """Move the logits to the optimum of the ELBO of discrete gates, in place.

    Parameters
    ----------
    log_likelihood : function
        From one draw of every gate set to a log likelihood in nats, shape (), differentiable in
        the gates: of the whole data set or, in turn, of one of its parts, whose sum it is.
    log_factor : function
        From open probabilities of every gate set to the expected log factor of the prior in
        nats, shape (), or None.
    sets : sequence of GateSet
        What to refine.
    iterations : int
        Updates of all logits.
    draws : int
        Draws an iteration, in antithetic pairs: an even number.
    parts : int
        How many calls of `log_likelihood` go through the whole data set; every time in the same
        order.
    damping : float
        Share of the way to the optimum that an update goes.
    on_iteration : function
        Called before every update with the log likelihood in nats, as the mean over draws of
        gates that are all open or closed has it for the whole data set.
    generator : torch.Generator, optional
        Draws the gates.
    after : mapping of str to Tensor, optional
        A state that `keep` was given in an ascent that was stopped: go on after it.
    keep : function
        Called after every update with all that an iteration changes but the generator's state;
        the tensors are those at work, so what is to be kept has to be written or copied.

    Raises
    ------
    NumericalError
        If the log likelihood or its gradient is not finite.
    KeyError, RuntimeError
        If the state is of another ascent.
    """
    whole = draws // 2 if any(gates.bends for gates in sets) else draws
    visits = WINDOW * iterations / parts
    windows = visits * whole, visits * (draws - whole)
    slopes = [Slopes(gates.logits, parts, windows) for gates in sets]
    done = torch.zeros((), dtype=torch.long)
    state = {"done": done}
    for k, (gates, slope) in enumerate(zip(sets, slopes, strict=True)):
        state |= {f"{k}.{name}": tensor for name, tensor in slope.state().items()}
        state[f"{k}.logits"] = gates.logits
    if after is not None:
        for name, tensor in state.items():
            tensor.copy_(after[name])
    for iteration in range(int(done), iterations):
        drawn, middle = zip(*(gates.draw(draws, whole, generator) for gates in sets), strict=True)
        points = [z.lerp(torch.full_like(z, 0.5), m) for z, m in zip(drawn, middle, strict=True)]
        values: list[float] = []
        # in any order, so that no part is always seen with gates at 1/2
        for turn, draw in enumerate(torch.randperm(draws, generator=generator).tolist()):
            leaves = [gates[draw].clone().requires_grad_() for gates in points]
            value = log_likelihood(*leaves)
            gradients = torch.autograd.grad(value, leaves)
            if not all(torch.isfinite(x).all() for x in (value, *gradients)):
                raise NumericalError("refinement: log likelihood, or its gradient, not finite")
            if draw < whole:
                values.append(value.item())
            part = (iteration * draws + turn) % parts
            for gates, slope, z, m, gradient in zip(
                sets, slopes, drawn, middle, gradients, strict=True
            ):
                reached = reach(z[draw], gates.structure)
                slope.add(part, draw < whole, z[draw], gradient, m[draw], reached)
        on_iteration(fmean(values) * parts)
        for gates, slope, factor in zip(
            sets, slopes, _factor_slopes(log_factor, sets), strict=True
        ):
            reached = reach(gates.logits.sigmoid(), gates.structure).clamp_min(1e-12)
            optimum = (
                gates.prior_logits + slope.integrals() + factor / reached - divergence(gates)[1]
            )
            # the way back from certainty is as short from any logit
            inward = (optimum - gates.logits) * gates.logits < 0
            bounded = gates.logits.clamp(-CERTAIN, CERTAIN)
            gates.logits.copy_(torch.where(inward, bounded, gates.logits))
            gates.logits += (damping * (optimum - gates.logits)).clamp(-MAX_STEP, MAX_STEP)
        done += 1
        keep(state)


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
