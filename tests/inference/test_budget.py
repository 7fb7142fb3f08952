"""Meeting a budget: logits that are linear in the price, and the decision they lead to."""

import pytest
import torch

from bayes_lora.costs import relative_bops
from bayes_lora.gates import independent, nested
from bayes_lora.inference.budget import decided_share, meet_budget
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
def test_without_data_a_gate_weighs_what_opening_it_costs(make, structure, kinds):
    model, guide = make(
        GibbsGates(price=700.0, rank_logits=-0.4, bit_logits=0.9), structure, **kinds
    )
    probs = guide.open_probabilities()
    found = model.logits_without_data(probs)
    for kind, (p, logits, prior) in enumerate(zip(probs, found, (-0.4, 0.9), strict=True)):
        if p is None:
            assert logits is None
            continue
        chain = kind == 1 or structure is nested
        for index in [(0, 0), (5, 1), (17, 2)] if kind == 0 else [(0, 0, 0), (5, 3, 1), (9, 4, 2)]:
            shares = []
            for state in (1.0, 0.0):
                q = p.double().clone()
                if chain:  # it is reached
                    q[*index[:-1], : index[-1]] = 1.0
                q[index] = state
                gates = list(probs)
                gates[kind] = q
                shares.append(relative_bops(model.network, *gates).double())
            expected = prior - 700 * (shares[0] - shares[1])
            torch.testing.assert_close(logits[index], expected, rtol=1e-3, atol=1e-5)


def test_without_data_and_without_a_factor_the_prior_is_left(make):
    model, guide = make(IndependentGates(rank_logits=-0.4, bit_logits=0.9))
    rank, bits = model.logits_without_data(guide.open_probabilities())
    assert torch.equal(rank.float(), model.rank_prior_logits)
    assert torch.equal(bits.float(), model.bit_prior_logits)


@pytest.mark.parametrize("budget", [0.013, 0.05])
def test_the_decision_meets_the_budget_and_the_logits_follow_the_price(make, budget):
    model, guide = make(GibbsGates(price=700.0, budget=budget))
    probs = guide.open_probabilities()
    before = [guide.rank_logits.detach().clone(), guide.bit_logits.detach().clone()]
    then = model.logits_without_data(probs)
    assert abs(decided_share(model, guide) / budget - 1) > 0.2
    meet_budget(model, guide)
    assert decided_share(model, guide) == pytest.approx(budget, rel=0.05)
    now = model.logits_without_data(probs)
    after = (guide.rank_logits, guide.bit_logits)
    for new, old, *pair in zip(after, before, now, then, strict=True):
        torch.testing.assert_close(new.detach(), (old + pair[0] - pair[1]).float())


@pytest.mark.parametrize("gates", [GibbsGates(price=700.0), IndependentGates()])
def test_without_a_budget_nothing_moves(make, gates):
    model, guide = make(gates)
    before = guide.rank_logits.detach().clone()
    meet_budget(model, guide)
    assert torch.equal(guide.rank_logits, before)
    assert getattr(gates, "price", 700.0) == 700.0
