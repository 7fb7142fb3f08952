"""The same model and guide on images: a vision transformer has no words and no padding."""

import pyro
import pytest
import torch

from bayes_lora.inference.elbo import TermwiseELBO
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork, Latents

LABELS = torch.tensor([0, 1, 1, 0, 1])


@pytest.fixture
def pair(backbone, images):
    """Model and guide of 50 images, calibrated."""
    with pyro.settings.context(module_local_params=True):
        network = AdaptedNetwork(backbone("vit"), rank=3)
        model = BayesianLoRA(network, Classification(), Priors(), num_examples=50)
        guide = GateGuide(model, network.initial_adapter_weights())
        network.calibrate([images], guide.loc.detach())
        yield model, guide


def test_one_step_moves_all_that_is_trained_and_nothing_else(pair, images):
    module = TermwiseELBO()(*pair)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    module(images, LABELS).backward()
    torch.optim.Adam(trained.values(), lr=1e-2).step()
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trained)
    kinds = {name.rpartition(".")[2] for name in moved}
    assert kinds == {"loc", "rank_logits", "bit_logits", "weight", "bias"}  # two of the head


def test_its_log_likelihood_is_the_cross_entropy_of_all_images(pair, images):
    model, guide = pair
    held = guide.decision()
    elbo = TermwiseELBO()
    with torch.no_grad():
        logits = model.network(images, Latents(guide.loc, *held))
        elbo.differentiable_loss(model, guide, images, LABELS, 1.0, held)
    nll = torch.nn.functional.cross_entropy(logits, LABELS, reduction="sum")
    assert float(elbo.terms["log_likelihood"]) == pytest.approx(-50 / 5 * float(nll), rel=1e-5)
