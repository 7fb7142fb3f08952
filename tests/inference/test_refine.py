"""Refinement of a guide: one layer of a transformer, its rank and bits, all settings summed."""

import itertools

import pytest
import torch
from torch.distributions import kl_divergence

from bayes_lora.gates import level_weights, rank_probabilities
from bayes_lora.inference.refine import refine_guide
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import GibbsGates, IndependentGates, Priors
from bayes_lora.network import AdaptedNetwork, Latents

EXAMPLES = 150


@pytest.fixture
def trained(backbone):
    """A model of one adapted layer, a guide with weights that matter, and the data they made."""

    def make(gates, temperature=1.0, normal_weights=False):
        network = AdaptedNetwork(
            backbone(), rank=2, alpha=6.0, target_modules=".*0.attention.self.query",
            quantized_tensors=["weight", "input"], num_levels=2,
        )  # fmt: skip
        network.eval()
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(2, 60, (EXAMPLES, 7), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        weights = 0.5 * torch.randn(network.num_adapter_weights, generator=generator)
        network.calibrate([batch], weights)
        truth = Gates(torch.tensor([[1.0, 0.0]]), torch.ones(network.bit_gate_shape))
        with torch.no_grad():
            p = network(batch, Latents(weights, *truth)).softmax(-1)
        labels = torch.multinomial(p, 1, generator=generator).squeeze(-1)
        priors = Priors(gates=gates, adapter_weight_temperature=temperature)
        model = BayesianLoRA(network, Classification(), priors, EXAMPLES)
        return model, GateGuide(model, weights, normal_weights), batch | {"labels": labels}

    return make


def leading(count, size):
    return (torch.arange(size) < count).float()


@torch.no_grad()
def marginals(model, guide, data, cost_of_rank=(0.0, 0.0, 0.0)):
    """Exact posterior of rank (3,) and of the bits of weight and input (3,), by enumeration."""
    batch = {k: v for k, v in data.items() if k != "labels"}
    rank_prior = rank_probabilities(model.rank_prior_logits.sigmoid())[0].log()
    bits_prior = level_weights(model.bit_prior_logits.sigmoid())[0].log()
    table = torch.empty(3, 3, 3)
    for r, w, x in itertools.product(range(3), repeat=3):
        gates = Gates(leading(r, 2)[None], torch.stack([leading(w, 2), leading(x, 2)])[None])
        output = model.network(batch, Latents(guide.loc, *gates))
        factor = model.priors.gates.log_factor(model.network, *gates)
        table[r, w, x] = (
            model.likelihood(output).log_prob(data["labels"]).sum()
            + rank_prior[r] + bits_prior[0, w] + bits_prior[1, x] - cost_of_rank[r]
            + (0.0 if factor is None else factor)
        )  # fmt: skip
    posterior = torch.softmax(table.flatten(), 0).view(3, 3, 3)
    return posterior.sum((1, 2)), posterior.sum((0, 2)), posterior.sum((0, 1))


@pytest.mark.parametrize(
    "gates",
    [IndependentGates(rank_logits=-0.3, bit_logits=0.4), GibbsGates(bit_logits=0.4, price=20.0)],
    ids=["independent", "gibbs"],
)
def test_rank_and_bits_of_a_layer_have_their_exact_posterior(gates, trained):
    model, guide, data = trained(gates)
    terms = []
    refine_guide(model, guide, [data], passes=480, on_iteration=terms.append)
    rank, bits = guide.open_probabilities()
    found = rank_probabilities(rank)[0], *level_weights(bits)[0]
    exact = marginals(model, guide, data)
    for q, p in zip(found, exact, strict=True):
        # between layers and tensors the guide is mean-field, which costs part of this
        assert 0.5 * float((q - p).abs().sum()) <= 0.03
    assert len(terms) == 120
    assert ("energy" in terms[0]) == isinstance(gates, GibbsGates)
    assert all(terms[-1][f"kl_{name}"] >= 0 for name in ("rank_gate", "bit_gate"))


def test_a_component_has_to_earn_the_divergence_of_its_weights_at_its_temperature(trained):
    temperature = 0.004
    model, guide, data = trained(
        IndependentGates(rank_logits=1.5), temperature, normal_weights=True
    )
    with torch.no_grad():
        guide.log_scale.fill_(-9.0)  # draws are next to the mean, which is what is enumerated
    posterior, prior = guide.adapter_weights(), model.priors.adapter_weights(model.network)
    each = kl_divergence(posterior.base_dist, prior.base_dist).detach()
    each = torch.zeros(2).index_add(0, guide.component, each)
    cost = temperature * torch.tensor([0.0, each[0], each.sum()])
    refine_guide(model, guide, [data], passes=480)
    found = rank_probabilities(guide.open_probabilities().rank_gate)[0]
    exact, free = marginals(model, guide, data, cost)[0], marginals(model, guide, data)[0]
    assert 0.5 * float((found - exact).abs().sum()) <= 0.03
    assert 0.5 * float((free - exact).abs().sum()) > 0.2  # at temperature 0
    full = marginals(model, guide, data, cost / temperature)[0]
    assert 0.5 * float((full - exact).abs().sum()) > 0.2  # at temperature 1


def test_weights_are_held_and_the_mode_is_given_back(trained):
    model, guide, data = trained(IndependentGates())
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loc = guide.loc.detach().clone()
    refine_guide(model, guide, [data], passes=4, draws=2)
    assert model.training
    assert torch.equal(guide.loc, loc)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
