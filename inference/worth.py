r"""What the data say that every component and level is worth, read off the posterior.

Take the log likelihood to be linear in the weights of components, sum_k delta_k z_1 ... z_k, and
alike in those of levels. Opening gate k, reached with probability r_k, then gains

    D_k = delta_k + m_{k+1} D_{k+1},        m_k = E[z_k],   r_k = m_1 ... m_{k-1},

and where the ELBO is stationary D_k follows from the guide's logit a_k and the prior's:

    relaxed gates    r_k D_k = (KL'(a_k, prior_k) + T W'(a_k)) / m'(a_k) - d E[log factor] / d m_k
    discrete gates   D_k = a_k - prior_k + (1 / r_k) d (T W - E[log factor]) / d p_k + K_k

with W the divergence of the weights behind open rank gates (`gated_normal`; none of a point mass)
and T its temperature; KL', W' and m' are derivatives in a_k, of the hard concrete divergence and
mean besides; m_k = p_k = sigmoid(a_k) for discrete gates, and K_k is the divergence of the gates
behind gate k (`natural_gradient.py`). Independent gates are the case r_k = 1, delta_k = D_k. All in
nats, delta_k the worth of component or level k.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from bayes_lora.distributions import HardConcrete
from bayes_lora.gates import nested, reach
from bayes_lora.inference.natural_gradient import GateSet, divergence
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import TEMPERATURE, BayesianLoRA, Gates


@torch.no_grad()
def worth(model: BayesianLoRA, guide: GateGuide, refined: bool) -> Gates:
    """Log likelihood that each further component and level gains, delta_k above; nats.

    Parameters
    ----------
    model, guide : BayesianLoRA, GateGuide
        A trained pair; the price of the prior is the one that training ended with.
    refined : bool
        Whether the guide is that of discrete gates.

    Returns
    -------
    Gates
        In double precision, shapes (L, R) and (L, T, K).
    """
    logits = Gates(guide.rank_logits, guide.bit_logits).map(lambda a: a.detach().cpu().double())
    means = logits.map(torch.sigmoid if refined else _mean)
    without = model.logits_without_data(means)
    priors = Gates(model.rank_prior_logits, model.bit_prior_logits)
    of_weights = Gates(_weights_slope(model, guide, logits.rank_gate, refined))
    found: list[Tensor | None] = []
    for a, m, unmoved, prior, behind, order in zip(
        logits, means, without, priors, of_weights, (model.network.structure, nested), strict=True
    ):
        if a is None:
            found.append(None)
            continue
        prior = cast(Tensor, prior).double()
        slope, reached = cast(Tensor, unmoved) - prior, reach(cast(Tensor, m), order)
        behind = torch.zeros_like(a) if behind is None else behind
        if refined:
            D = a - prior - slope + behind / reached + divergence(GateSet(a, prior, order))[1]
        else:
            D = _divergence_slope(a, prior, behind) / reached - slope
        if order is nested:  # all at once: the right side is what D was
            D = D - torch.cat([cast(Tensor, m)[..., 1:] * D[..., 1:], 0 * D[..., :1]], -1)
        found.append(D)
    return Gates(*found)


def _mean(logits: Tensor) -> Tensor:
    return HardConcrete(TEMPERATURE, logits=logits).mean


def _weights_slope(
    model: BayesianLoRA, guide: GateGuide, logits: Tensor | None, refined: bool
) -> Tensor | None:
    """Derivative of T W in the logits of rank gates or, of discrete ones, in their probability."""
    if logits is None or guide.log_scale is None:
        return None
    with torch.enable_grad():
        leaf = (logits.sigmoid() if refined else logits).clone().requires_grad_()
        opened = leaf if refined else 1 - HardConcrete(TEMPERATURE, logits=leaf).probability_closed
        posterior = guide.adapter_weights(model.network.structure(opened).to(guide.loc))
        try:
            W = kl_divergence(posterior, model.priors.adapter_weights(model.network))
        except NotImplementedError:  # estimated with a draw, for which all weights count as used
            return None
        return torch.autograd.grad(model.priors.adapter_weight_temperature * W, leaf)[0]


def _divergence_slope(logits: Tensor, prior: Tensor, behind: Tensor) -> Tensor:
    """Derivative of the divergence from the prior, `behind` more, in the mean of the gate."""
    with torch.enable_grad():
        a = logits.clone().requires_grad_()
        gate = HardConcrete(TEMPERATURE, logits=a)
        kl = kl_divergence(gate, HardConcrete(TEMPERATURE, logits=prior))
        (of_kl,) = torch.autograd.grad(kl.sum(), a)
        (of_mean,) = torch.autograd.grad(gate.mean.sum(), a)
    return (of_kl + behind) / of_mean
