"""A budget of bit operations: the price at which the decision meets it.

In the joint phase dual ascent moves the price by how far the decision is from the budget
(`train.py`). What is left is corrected once, before the network settles. All else held, the
optimal logit of a discrete gate differs from the one it would have without data by a constant,
what the data say; so it moves with the price as that one does
(`BayesianLoRA.logits_without_data`): down when the price goes up, and with it the share of bit
operations that is decided. Bisection finds the price.
"""

from __future__ import annotations

import math
from typing import cast

import torch

from bayes_lora.costs import relative_bops
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates
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
    logits = Gates(guide.rank_logits, guide.bit_logits)
    probabilities = guide.open_probabilities()
    before, without_data = logits.map(torch.clone), model.logits_without_data(probabilities)
    price, budget = prior.price, prior.budget

    def miss(log_factor: float) -> float:
        """How far from the budget, in the log of the share, at a price times exp(log_factor)."""
        prior.price = price * math.exp(log_factor)
        moved = model.logits_without_data(probabilities)
        for new, *known in zip(logits, before, moved, without_data, strict=True):
            if new is not None:
                old, now, then = cast(list[torch.Tensor], known)
                new.copy_(old + (now - then))
        return math.log(decided_share(model, guide) / budget)

    low, high = -FURTHEST, FURTHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if miss(middle) > 0 else (low, middle)
    miss(min((low, high), key=lambda end: abs(miss(end))))  # the nearer side of a step
