"""Meeting a budget: logits that are linear in the price, and the decision they lead to."""

import pytest
import torch

from bayes_lora.costs import relative_bops
from bayes_lora.gates import independent, nested
from bayes_lora.inference.budget import decided_share, logit_slopes, meet_budget
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import GibbsGates, IndependentGates, Priors
from bayes_lora.network import AdaptedNetwork


@pytest.fixture
def make(backbone):
    """Model and guide of a network of four blocks, its gates here open and there closed."""

    def made(gates, structure=nested, **kinds):
        network = AdaptedNetwork(
            backbone(num_hidden_layers=4), rank=4, alpha=8.0, structure=structure
        )
        model = BayesianLoRA(network, Classification(), Priors(gates=gates), 100, **kinds)
        guide = GateGuide(model, network.initial_adapter_weights())
        for logits in (guide.rank_logits, guide.bit_logits):
            if logits is not None:
                torch.nn.init.normal_(logits, mean=0.5, std=3.0)
        return model, guide

    return made


@pytest.mark.parametrize("kinds", [{}, {"bit_gates": False}, {"rank_gates": False}])
@pytest.mark.parametrize("structure", [nested, independent])
def test_slopes_are_what_opening_a_gate_that_is_reached_adds(make, structure, kinds):
    model, guide = make(GibbsGates(), structure, **kinds)
    probs = guide.open_probabilities()
    found = iter(logit_slopes(model, guide))
    for kind, p in enumerate(probs):
        if p is None:
            continue
        slope = next(found)
        chain = kind == 1 or structure is nested
        for index in [(0, 0), (5, 1), (17, 2)] if kind == 0 else [(0, 0, 0), (5, 3, 1), (9, 4, 2)]:
            shares = []
            for state in (1.0, 0.0):
                q = p.double().clone()
                if chain:
                    q[*index[:-1], : index[-1]] = 1.0
                q[index] = state
                gates = list(probs)
                gates[kind] = q
                shares.append(relative_bops(model.network, *gates).double())
            torch.testing.assert_close(slope[index], shares[1] - shares[0], rtol=1e-3, atol=1e-8)
    assert next(found, None) is None


@pytest.mark.parametrize("budget", [0.013, 0.05])
def test_the_decision_meets_the_budget_and_the_logits_follow_the_price(make, budget):
    model, guide = make(GibbsGates(price=700.0, budget=budget))
    slopes = logit_slopes(model, guide)
    before = [guide.rank_logits.detach().clone(), guide.bit_logits.detach().clone()]
    assert abs(decided_share(model, guide) / budget - 1) > 0.2
    meet_budget(model, guide)
    assert decided_share(model, guide) == pytest.approx(budget, rel=0.05)
    added = model.priors.gates.price - 700.0
    for new, old, slope in zip((guide.rank_logits, guide.bit_logits), before, slopes, strict=True):
        torch.testing.assert_close(new.detach(), (old + added * slope).float())


@pytest.mark.parametrize("gates", [GibbsGates(price=700.0), IndependentGates()])
def test_without_a_budget_nothing_moves(make, gates):
    model, guide = make(gates)
    before = guide.rank_logits.detach().clone()
    meet_budget(model, guide)
    assert torch.equal(guide.rank_logits, before)
    assert getattr(gates, "price", 700.0) == 700.0
