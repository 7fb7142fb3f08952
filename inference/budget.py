"""A budget of bit operations: the price at which the decision meets it.

In the joint phase dual ascent moves the price by how far the decision is from the budget
(`train.py`). What is left is corrected once, before the network settles. For discrete gates the
optimal logit of gate k is linear in the price, all else held (`natural_gradient.py`),

    a_k(price') = a_k(price) - (price' - price) / r_k * d E[share] / d p_k,

where r_k is the probability that gate k is reached. So every logit falls with the price, and with
it the share of bit operations that is decided: bisection finds the price.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayes_lora.costs import relative_bops
from bayes_lora.gates import nested, reach
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import GibbsGates

FURTHEST = math.log(1000.0)  # how far the log of the price is moved at most
HALVINGS = 40
TOLERANCE = 0.05
"""By what share of itself a budget may be missed: gates move the decision in steps."""


@torch.no_grad()
def decided_share(model: BayesianLoRA, guide: GateGuide) -> float:
    """Bit operations of the decision, a share of those at 32 x 32 bits and full rank."""
    return float(relative_bops(model.network, *guide.decision()))


@torch.no_grad()
def meet_budget(model: BayesianLoRA, guide: GateGuide) -> None:
    """Move the price of a Gibbs prior, and the gate logits with it, until the decision meets it.

    Nothing happens to a prior without a budget. A budget that no price within a factor of 1000 of
    the present one can meet is missed; `decided_share` tells.

    Parameters
    ----------
    model, guide : BayesianLoRA, GateGuide
        Price and gate logits are changed in place.

    Examples
    --------
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from bayes_lora.models.likelihoods import Classification
    >>> from bayes_lora.models.priors import Priors
    >>> from bayes_lora.network import AdaptedNetwork
    >>> config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=6,
    ...                     num_attention_heads=2, intermediate_size=64)
    >>> network = AdaptedNetwork(BertForSequenceClassification(config), rank=4)
    >>> priors = Priors(gates=GibbsGates(budget=0.04))
    >>> model = BayesianLoRA(network, Classification(), priors, num_examples=100)
    >>> guide = GateGuide(model, network.initial_adapter_weights())
    >>> for logits in (guide.rank_logits, guide.bit_logits):
    ...     _ = torch.nn.init.normal_(logits, std=3.0)
    >>> meet_budget(model, guide)
    >>> 0.038 < decided_share(model, guide) < 0.042
    True
    """
    prior = model.priors.gates
    if not isinstance(prior, GibbsGates) or prior.budget is None:
        return
    before = {p: p.clone() for p in (guide.rank_logits, guide.bit_logits) if p is not None}
    slopes, price, budget = logit_slopes(model, guide), prior.price, prior.budget

    def miss(log_factor: float) -> float:
        """How far from the budget, in the log of the share, at a price times exp(log_factor)."""
        prior.price = price * math.exp(log_factor)
        for (logits, old), slope in zip(before.items(), slopes, strict=True):
            logits.copy_(old + (prior.price - price) * slope)
        return math.log(decided_share(model, guide) / budget)

    low, high = -FURTHEST, FURTHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if miss(middle) > 0 else (low, middle)
    miss(min((low, high), key=lambda end: abs(miss(end))))  # the nearer side of a step


def logit_slopes(model: BayesianLoRA, guide: GateGuide) -> list[Tensor]:
    """Derivative of the optimal gate logits in the price, in nats per nat, all else held.

    Returns
    -------
    list of Tensor
        Of the rank gates, shape (L, R), and of the bit gates, shape (L, T, K), as far as the
        guide has them; nowhere positive.

    """
    probs = guide.open_probabilities().map(lambda p: p.double())
    with torch.enable_grad():
        leaves = probs.map(lambda p: p.requires_grad_())
        share = relative_bops(model.network, *leaves)
        found = [p for p in leaves if p is not None]
        gradients = torch.autograd.grad(share, found)
    structures = [
        structure
        for p, structure in zip(leaves, (model.network.structure, nested), strict=True)
        if p is not None
    ]
    return [
        -gradient / reach(p.detach(), structure).clamp_min(1e-300)
        for p, gradient, structure in zip(found, gradients, structures, strict=True)
    ]
