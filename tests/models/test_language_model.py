"""The same model and guide on texts: every token given those before it."""

import pyro
import pytest
import torch

from bayes_lora.inference.elbo import TermwiseELBO
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import LanguageModel
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork, Latents
from bayes_lora.next_tokens import IGNORED, NextTokens

KINDS = ["llama writes", "gpt2 writes"]


@pytest.fixture
def labels(batch):
    """The texts themselves, without padding, and without the prompt of the first."""
    found = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    found[0, :4] = IGNORED
    return found


@pytest.fixture
def pair(backbone, batch):
    """Make model and guide of 50 texts, calibrated."""

    def make(kind):
        network = AdaptedNetwork(backbone(kind), rank=3)
        model = BayesianLoRA(network, LanguageModel(), Priors(), num_examples=50)
        guide = GateGuide(model, network.initial_adapter_weights())
        network.calibrate([batch], guide.loc.detach())
        return model, guide

    with pyro.settings.context(module_local_params=True):
        yield make


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_likelihood_is_the_loss_of_transformers_times_the_tokens(
    kind, pair, backbone, batch, labels
):
    model, guide = pair(kind)
    stock = backbone(kind).eval()
    with torch.no_grad():
        wanted = -stock(**batch, labels=labels).loss * (labels[:, 1:] != IGNORED).sum()
        output = model.eval().network(batch, Latents(guide.loc))
        found = model.likelihood(output).log_prob(labels)
    assert found.shape == (5,)
    assert float(found.sum()) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plate_counts_texts(kind, pair, batch, labels):
    model, guide = pair(kind)
    held = guide.decision()
    elbo = TermwiseELBO()
    with torch.no_grad():
        output = model.eval().network(batch, Latents(guide.loc, *held))
        elbo.differentiable_loss(model, guide, batch, labels, 1.0, held)
    each = model.likelihood(output).log_prob(labels)
    assert float(elbo.terms["log_likelihood"]) == pytest.approx(
        50 / 5 * float(each.sum()), rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_steps_learn_the_texts_and_train_no_embeddings(kind, pair, batch, labels):
    module = TermwiseELBO()(*pair(kind))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"loc", "rank_logits", "bit_logits"}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(module(batch, labels, 0.0))
        losses[-1].backward()
        optimizer.step()
    assert all((p.grad != 0).any() for p in trained.values())
    assert losses[-1] < 0.8 * losses[0]


def test_tokens_are_drawn_as_often_as_the_logits_say():
    p = torch.tensor([0.1, 0.2, 0.7])
    drawn = NextTokens(p.log().expand(1, 3, 3)).sample((20_000,))
    assert drawn.shape == (20_000, 1, 3)
    assert (drawn[..., 0] == IGNORED).all()
    for place in (1, 2):
        share = torch.bincount(drawn[:, 0, place], minlength=3) / len(drawn)
        assert ((share - p).abs() < 4 * (p * (1 - p) / len(drawn)).sqrt()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_labels_texts_are_drawn(kind, pair, batch):
    model, _ = pair(kind)
    drawn = model(batch)
    assert drawn.shape == batch["input_ids"].shape
    assert ((drawn[:, 1:] >= 0) & (drawn[:, 1:] < 60)).all()
