"""The ELBO that SVI optimises is that of Pyro; this one also keeps its terms, to be read.

    loss = -E_q[log p(label | latents)] + kl_weight * (sum of KL(q || p) + price * share of BOPs)

where the KL of the adapter weights may have a temperature besides (`models/priors.py`).

Source: `pyro.infer.TraceMeanField_ELBO`, the ELBO with closed-form divergences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import check_fully_reparametrized, is_validation_enabled
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

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Pyro's, but that nothing is looked at: the host would wait for the device each time."""
        losses = [self._loss(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
        return torch.stack(losses).mean()

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Trace
    ) -> tuple[Tensor, Tensor]:
        loss = self._loss(model_trace, guide_trace)
        return loss.detach(), loss

    def _loss(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """Minus the ELBO of a pair of traces, the model's replayed against the guide's."""
        costs: list[Tensor] = []
        self.terms = {}
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                costs.append(-site["log_prob_sum"])
                if name == "label":
                    self.terms["log_likelihood"] = site["log_prob_sum"].detach()
                elif name == "bops":
                    self.terms["energy"] = -cast(Unit, site["fn"]).log_factor.detach()
                continue
            mine = guide_trace.nodes[name]
            if is_validation_enabled():
                check_fully_reparametrized(mine)
            try:
                kl = kl_divergence(cast(Distribution, mine["fn"]), cast(Distribution, site["fn"]))
            except NotImplementedError:  # estimated with the draw
                kl = mine["unscaled_log_prob"] - site["unscaled_log_prob"]
            self.terms[f"kl_{name}"] = kl.sum().detach()
            costs.append(scale_and_mask(kl, mine["scale"], mine["mask"]).sum())
        for name, site in guide_trace.nodes.items():  # auxiliary: of the guide alone
            if site["type"] == "sample" and name not in model_trace.nodes:
                costs.append(site["log_prob_sum"])
        return torch.stack(costs).sum()


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
