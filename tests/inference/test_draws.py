"""Draws of gates against closed forms and full enumeration, within their standard errors."""

import itertools

import torch

from bayes_lora.costs import bit_operations, relative_bops
from bayes_lora.gates import level_weights, rank_probabilities
from bayes_lora.inference.draws import draw_posterior, draw_prior, log_probability
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import GibbsGates, IndependentGates, Priors
from bayes_lora.network import AdaptedNetwork

DRAWS = 4000


def made(backbone, gates):
    network = AdaptedNetwork(
        backbone(num_hidden_layers=1), rank=2, quantized_tensors=["weight", "input"],
        target_modules=".*(query|intermediate.dense)", num_levels=2,
    )  # fmt: skip
    return BayesianLoRA(network, Classification(), Priors(gates=gates), num_examples=10)


def close(found, expected):
    """Within 4.5 standard errors of a probability estimated from the draws."""
    error = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 4.5 * error + 1e-9).all(), (found, expected)


def frequencies(counts, size):
    return torch.stack([(counts == k).double().mean(0) for k in range(size)], -1)


def test_draws_of_the_guide_have_its_probabilities(backbone):
    model = made(backbone, IndependentGates())
    guide = GateGuide(model, torch.zeros(model.network.num_adapter_weights))
    torch.nn.init.normal_(guide.rank_logits)
    torch.nn.init.normal_(guide.bit_logits)
    gates = draw_posterior(guide, DRAWS, torch.Generator().manual_seed(0))
    probs = guide.open_probabilities()
    ranks = gates.rank_gate.cumprod(-1).sum(-1)
    close(frequencies(ranks, 3), rank_probabilities(probs.rank_gate).double())
    levels = gates.bit_gate.cumprod(-1).sum(-1)
    close(frequencies(levels, 3), level_weights(probs.bit_gate).double())


def test_draws_of_a_prior_without_coupling(backbone):
    model = made(backbone, IndependentGates(rank_logits=-0.7, bit_logits=0.4))
    gates = draw_prior(model, DRAWS, torch.Generator().manual_seed(0))
    close(gates.rank_gate.double().mean(0), model.rank_prior_logits.sigmoid().double())
    close(gates.bit_gate.double().mean(0), model.bit_prior_logits.sigmoid().double())


def test_draws_of_the_gibbs_prior_against_all_configurations_of_a_layer(backbone):
    model = made(backbone, GibbsGates(rank_logits=0.3, bit_logits=0.8, price=9.0))
    network = model.network
    configurations = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2 + 2 * 2)))
    full = float(
        relative_bops(network) * (bit_operations(network).sum() + network.frozen_macs * 1024)
    )
    bias = torch.tensor([0.3, 0.3, *[0.8] * 4])
    expected = []
    for layer in range(2):
        weights = []
        for z in configurations:
            rank = z[:2].expand(2, 2)
            bits = z[2:].view(2, 2).expand(2, 2, 2)
            cost = bit_operations(network, rank, bits)[layer] / full
            weights.append((z * bias).sum() - 9.0 * cost)
        expected.append(torch.softmax(torch.stack(weights), 0) @ configurations)
    expected = torch.stack(expected).double()
    gates = draw_prior(model, DRAWS, torch.Generator().manual_seed(0))
    found = torch.cat([gates.rank_gate.flatten(2), gates.bit_gate.flatten(2)], -1).double().mean(0)
    close(found, expected)
    assert (expected[:, 0] - expected[:, 2]).abs().min() > 0.02  # the factor does something


def test_log_probability_counts_gates_that_are_reached(backbone):
    model = made(backbone, IndependentGates(rank_logits=-0.7, bit_logits=0.4))
    rank = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    bits = torch.tensor([[[[1.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]]]])
    logits = Gates(model.rank_prior_logits, model.bit_prior_logits)
    p, q = torch.tensor([-0.7, 0.4]).sigmoid()
    # the second rank gate of layer 2 and the bit gates behind a closed one are not reached
    expected = p.log() + 2 * (1 - p).log() + 3 * q.log() + 3 * (1 - q).log()
    assert torch.allclose(log_probability(Gates(rank, bits), logits, model), expected)
