r"""The posterior of adapter weights of which only some are used.

A component whose gate is closed is multiplied by zero: the data say nothing of its weights, so
their posterior is their prior. A guide that knows this draws, for weight i of component k,

    w_i | g_k > 0  ~  Normal(loc_i, scale_i),        w_i | g_k = 0  ~  prior,

and its divergence from the prior is that of the first line, as often as it applies:

    KL(q || p) = sum_i P(g_k(i) > 0) KL(Normal(loc_i, scale_i) || prior_i).

Two things follow. A component that is closed costs nothing; and a gate that would open has to
earn the divergence of the weights behind it, the factor by which Bayesian evidence prefers the
smaller rank. In a guide whose gates and weights are independent neither holds.

The idea is that of spike-and-slab priors: Mitchell and Beauchamp, "Bayesian variable selection in
linear regression", JASA 83 (1988).
"""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import Independent, kl_divergence, register_kl


class GatedNormal(dist.Independent):
    """Independent normal variables, each used with some probability and else at the prior.

    Samples and log densities are those of the variables when they are used. With a prior that has
    no closed form, Pyro estimates the divergence from these: then all count as used.

    Parameters
    ----------
    loc, scale : Tensor
        Mean and standard deviation, shape (P,).
    used : Tensor
        Probability of each variable to be used, shape (P,). The divergence is differentiable in
        it.

    Examples
    --------
    >>> import torch
    >>> posterior = GatedNormal(torch.ones(3), torch.ones(3), used=torch.tensor([0.0, 0.5, 1.0]))
    >>> prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> kl_divergence(posterior, prior)  # 1/2 nat for every variable that is used
    tensor(0.7500)
    """

    def __init__(self, loc: Tensor, scale: Tensor, used: Tensor) -> None:
        # not validated: what is not finite must reach the loss, where training stops by name
        super().__init__(dist.Normal(loc, scale, validate_args=False), 1, validate_args=False)
        self.used = used


@register_kl(GatedNormal, Independent)
def _kl_gated_normal_independent(q: GatedNormal, p: Independent) -> Tensor:
    if p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    return (q.used * kl_divergence(q.base_dist, p.base_dist)).sum(-1)
