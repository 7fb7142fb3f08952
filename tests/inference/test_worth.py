"""What gates are worth, where the log likelihood is known and the guide is at its optimum."""

import pytest
import torch
from torch.distributions import kl_divergence

from bayes_lora.distributions import HardConcrete
from bayes_lora.gates import independent, nested
from bayes_lora.inference.natural_gradient import GateSet, divergence
from bayes_lora.inference.worth import worth
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import TEMPERATURE, BayesianLoRA
from bayes_lora.models.priors import GibbsGates, Priors
from bayes_lora.network import AdaptedNetwork


def optimum(objective, *shapes):
    """Logits where the objective is largest."""
    logits = [torch.zeros(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    solver = torch.optim.LBFGS(
        logits,
        max_iter=3000,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        solver.zero_grad()
        loss = -objective(*logits)
        loss.backward()
        return loss

    solver.step(closure)
    return [a.detach() for a in logits]


@pytest.mark.parametrize("structure", [nested, independent])
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("price", [0.0, 40.0])
@pytest.mark.parametrize("normal", [False, True])
def test_worth_is_what_the_log_likelihood_gains(backbone, structure, refined, price, normal):
    """A log likelihood linear in components and levels; some are worth nothing."""
    network = AdaptedNetwork(backbone(num_hidden_layers=1), rank=3, structure=structure)
    gates = GibbsGates(price=price, rank_logits=-0.6, bit_logits=0.4)
    priors = Priors(gates=gates, adapter_weight_temperature=0.01)
    model = BayesianLoRA(network, Classification(), priors, num_examples=10)
    guide = GateGuide(model, network.initial_adapter_weights(), normal_weights=normal)
    generator = torch.Generator().manual_seed(4)
    known = [5 * torch.rand(shape, generator=generator).double() - 0.5
             for shape in (network.rank_gate_shape, network.bit_gate_shape)]  # fmt: skip
    known[0][1, 1] = known[1][2, 3, 0] = 0.0
    prior_logits = (model.rank_prior_logits.double(), model.bit_prior_logits.double())
    orders = (structure, nested)

    def elbo(*logits):
        total = torch.zeros((), dtype=torch.double)
        means = []
        for a, prior, delta, order in zip(logits, prior_logits, known, orders, strict=True):
            if refined:
                kl, m = divergence(GateSet(a, prior, order))[0], a.sigmoid()
                opened = m
            else:
                gate = HardConcrete(TEMPERATURE, logits=a)
                kl = kl_divergence(gate, HardConcrete(TEMPERATURE, logits=prior)).sum()
                m, opened = gate.mean, 1 - gate.probability_closed
            if normal and not means:  # behind open rank gates
                used = guide.adapter_weights(order(opened))
                total = total - 0.01 * kl_divergence(used, priors.adapter_weights(network))
            means.append(m)
            total = total + (delta * order(m)).sum() - kl
        return total + priors.gates.log_factor(network, *means)

    found = optimum(elbo, *(delta.shape for delta in known))
    for name, logits in zip(("rank_logits", "bit_logits"), found, strict=True):
        getattr(guide, name).data = logits
    for gain, delta in zip(worth(model, guide, refined), known, strict=True):
        torch.testing.assert_close(gain, delta, atol=2e-3, rtol=1e-3)


def test_gates_that_take_no_part_have_no_worth(network):
    model = BayesianLoRA(network, Classification(), Priors(), num_examples=10, bit_gates=False)
    guide = GateGuide(model, network.initial_adapter_weights())
    rank, bits = worth(model, guide, refined=False)
    assert rank.shape == (12, 3)
    assert bits is None
