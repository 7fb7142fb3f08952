"""The divergence of gated weights: of gate and weight together, by Monte Carlo, and by hand."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from bayes_lora.gated_normal import GatedNormal

LOC = torch.tensor([0.7, -1.2, 0.1], dtype=torch.double)
SCALE = torch.tensor([0.5, 0.2, 1.4], dtype=torch.double)
PRIOR = dist.Normal(torch.zeros(3, dtype=torch.double), 0.8).to_event(1)


def test_divergence_of_gates_and_weights_together():
    """One gate for the first weight, another for the other two."""
    p, prior_p = torch.tensor([0.3, 0.9]).double(), torch.tensor([0.6, 0.2]).double()
    used = p[[0, 1, 1]]
    gates = kl_divergence(Bernoulli(p), Bernoulli(prior_p)).sum()
    closed_form = gates + kl_divergence(GatedNormal(LOC, SCALE, used), PRIOR)
    draws = 200_000
    z = torch.bernoulli(p.expand(draws, 2))
    on = z[:, [0, 1, 1]]
    slab, spike = Normal(LOC, SCALE), PRIOR.base_dist
    w = torch.where(on > 0, slab.sample((draws,)), spike.sample((draws,)))
    log_q = Bernoulli(p).log_prob(z).sum(-1)
    log_q += torch.where(on > 0, slab.log_prob(w), spike.log_prob(w)).sum(-1)
    log_p = Bernoulli(prior_p).log_prob(z).sum(-1) + spike.log_prob(w).sum(-1)
    ratio = log_q - log_p
    assert float(closed_form) == pytest.approx(
        float(ratio.mean()), abs=4.5 * float(ratio.std()) / draws**0.5
    )


def test_what_is_always_used_is_a_plain_normal_and_what_never_is_costs_nothing():
    plain = dist.Normal(LOC, SCALE).to_event(1)
    always = GatedNormal(LOC, SCALE, torch.ones(3))
    torch.testing.assert_close(kl_divergence(always, PRIOR), kl_divergence(plain, PRIOR))
    assert float(kl_divergence(GatedNormal(LOC, SCALE, torch.zeros(3)), PRIOR)) == 0
    assert always.event_shape == (3,)
    torch.testing.assert_close(always.log_prob(LOC), plain.log_prob(LOC))


def test_a_gate_is_pulled_closed_by_the_divergence_of_its_weight():
    used = torch.tensor([0.3, 0.9, 0.5]).double().requires_grad_()
    kl_divergence(GatedNormal(LOC, SCALE, used), PRIOR).backward()
    each = kl_divergence(Normal(LOC, SCALE), PRIOR.base_dist)
    torch.testing.assert_close(used.grad, each)


def test_a_prior_without_closed_form_is_left_to_pyro():
    heavy = dist.StudentT(3.0).expand([3]).to_event(1)
    with pytest.raises(NotImplementedError):
        kl_divergence(GatedNormal(LOC.float(), SCALE.float(), torch.ones(3)), heavy)
