"""The ELBO that SVI optimises is Pyro's own; this one also keeps its terms, to be read.

    loss = -E_q[log p(label | latents)] + kl_weight * (sum of KL(q || p) + price * share of BOPs)

where the KL of the adapter weights may have a temperature besides (`models/priors.py`).

Source: `pyro.infer.TraceMeanField_ELBO`, the ELBO with closed-form divergences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from pyro.distributions import Unit
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

KL_TERMS = ("kl_adapter_weights", "kl_rank_gate", "kl_bit_gate")
Number = TypeVar("Number", float, Tensor)


class TermwiseELBO(TraceMeanField_ELBO):
    """Analytic-KL ELBO that remembers the terms of the last evaluation.

    Attributes
    ----------
    terms : dict of str to Tensor
        Nats, detached, shape (): `log_likelihood` of the whole data set as estimated from the
        batch, `kl_<site>` for every latent, and `energy`, price times share of bit operations.
        None of them is weighted: loss = -log_likelihood + kl_weight * `prior_cost` of the others.

    Examples
    --------
    >>> elbo = TermwiseELBO()
    >>> elbo.terms
    {}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.terms: dict[str, Tensor] = {}

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Trace
    ) -> tuple[Any, Tensor]:
        self.terms = elbo_terms(model_trace, guide_trace)
        return super()._differentiable_loss_particle(model_trace, guide_trace)


def prior_cost(terms: Mapping[str, Number], temperature: float) -> Number:
    """Sum of the terms other than the log likelihood, nats; as they are given, floats or tensors.

    Parameters
    ----------
    terms : mapping of str to float or Tensor
        As `TermwiseELBO.terms`, or some of them.
    temperature : float
        Weight of `kl_adapter_weights`, as `Priors.adapter_weight_temperature`.

    Examples
    --------
    >>> prior_cost({"log_likelihood": -9.0, "kl_adapter_weights": 8.0, "energy": 1.0}, 0.5)
    5.0
    """
    weight = {"kl_adapter_weights": temperature}
    costs = [v * weight.get(name, 1.0) for name, v in terms.items() if name != "log_likelihood"]
    return cast(Number, sum(costs))


@torch.no_grad()
def elbo_terms(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
    """Read every term of the ELBO off a pair of traces, in nats and without its KL weight.

    Parameters
    ----------
    model_trace, guide_trace : Trace
        Traces with log densities computed, the model's replayed against the guide's.

    Returns
    -------
    dict of str to Tensor
        As `TermwiseELBO.terms`.
    """
    terms: dict[str, Tensor] = {}
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        if name == "label":
            terms["log_likelihood"] = site["log_prob_sum"].detach()
        elif name == "bops":
            terms["energy"] = -cast(Unit, site["fn"]).log_factor.detach()
        elif not site["is_observed"]:
            mine = guide_trace.nodes[name]
            try:
                kl = kl_divergence(cast(Distribution, mine["fn"]), cast(Distribution, site["fn"]))
            except NotImplementedError:  # the ELBO estimates it with the draw; so do we
                kl = mine["unscaled_log_prob"] - site["unscaled_log_prob"]
            terms[f"kl_{name}"] = kl.sum().detach()
    return terms
