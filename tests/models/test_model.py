"""Model and guide as Pyro programs: sites, scaling, plain SVI, no data, and the price."""

import pyro
import pytest
import torch
from accelerate import Accelerator
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

from bayes_lora.costs import relative_bops
from bayes_lora.gates import independent
from bayes_lora.inference.elbo import TermwiseELBO
from bayes_lora.models.guides import GateGuide, open_up_to_quantile
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import CostWeightedGates, GibbsGates, IndependentGates, Priors
from bayes_lora.network import AdaptedNetwork

LABELS = torch.tensor([0, 1, 1, 0, 1])


def pair(network, *, priors=None, num_examples=50, normal_weights=False, **kinds):
    model = BayesianLoRA(network, Classification(), priors or Priors(), num_examples, **kinds)
    generator = torch.Generator().manual_seed(5)
    weights = 0.1 * torch.randn(network.num_adapter_weights, generator=generator)
    return model, GateGuide(model, weights, normal_weights)


def test_every_latent_is_a_sample_site_of_the_stated_shape(network, batch):
    model, guide = pair(network)
    trace = poutine.trace(model).get_trace(batch, LABELS)
    assert trace.nodes["adapter_weights"]["value"].shape == (network.num_adapter_weights,)
    assert trace.nodes["rank_gate"]["value"].shape == (12, 3)
    assert trace.nodes["bit_gate"]["value"].shape == (12, 6, 3)
    assert trace.nodes["label"]["is_observed"]
    latents = {"adapter_weights", "rank_gate", "bit_gate"}
    assert set(trace.stochastic_nodes) == latents | {"data"}  # and the plate
    assert set(poutine.trace(guide).get_trace(batch).stochastic_nodes) == latents


def test_prior_and_posterior_predictive_by_pyros_own_class(network, batch):
    model, guide = pair(network)
    prior = Predictive(model, num_samples=3)(batch)
    posterior = Predictive(model, guide=guide, num_samples=3)(batch)
    assert prior["label"].shape == posterior["label"].shape == (3, 5)
    assert prior["rank_gate"].squeeze(1).shape == (3, 12, 3)  # dimension 1 is for the plate


@pytest.mark.parametrize("normal_weights", [False, True])
def test_plain_pyro_svi_has_the_same_losses_as_the_module_loop(backbone, batch, normal_weights):
    """`SVI` with `ClippedAdam`, against the ELBO module with the same update written in torch."""

    def fresh():
        network = AdaptedNetwork(backbone(), rank=3)
        model, guide = pair(network, normal_weights=normal_weights)
        network.calibrate([batch], guide.loc.detach())
        return model, guide

    with pyro.settings.context(module_local_params=False):
        model, guide = fresh()
        svi = SVI(model, guide, ClippedAdam({"lr": 1e-2}), TraceMeanField_ELBO())
        pyro.set_rng_seed(1)
        expected = [svi.step(batch, LABELS) for _ in range(5)]
    with pyro.settings.context(module_local_params=True):
        module = TermwiseELBO()(*fresh())
        update = pyro.optim.clipped_adam.ClippedAdam(
            [p for p in module.parameters() if p.requires_grad], lr=1e-2
        )
        pyro.set_rng_seed(1)
        found = []
        for _ in range(5):
            loss = module(batch, LABELS)
            update.zero_grad()
            loss.backward()
            update.step()
            found.append(float(loss.detach()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[0] != pytest.approx(found[4], rel=1e-3)  # something was learned


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_terms_add_up_to_the_loss(network, batch, kl_weight):
    elbo = TermwiseELBO()
    model, guide = pair(network, priors=Priors(gates=GibbsGates(price=70.0)))
    loss = elbo.differentiable_loss(model, guide, batch, LABELS, kl_weight)
    terms = {name: float(value) for name, value in elbo.terms.items()}
    penalty = sum(value for name, value in terms.items() if name != "log_likelihood")
    assert set(terms) == {
        "log_likelihood",
        "energy",
        "kl_adapter_weights",
        "kl_rank_gate",
        "kl_bit_gate",
    }
    assert float(loss) == pytest.approx(-terms["log_likelihood"] + kl_weight * penalty, rel=1e-5)


def test_the_temperature_weighs_the_divergence_of_the_adapter_weights_alone(network, batch):
    elbo = TermwiseELBO()
    losses, terms = [], []
    for temperature in (1.0, 0.2):
        priors = Priors(gates=GibbsGates(price=70.0), adapter_weight_temperature=temperature)
        model, guide = pair(network, priors=priors, normal_weights=True)
        pyro.set_rng_seed(2)
        losses.append(float(elbo.differentiable_loss(model, guide, batch, LABELS, 0.3)))
        terms.append({name: float(value) for name, value in elbo.terms.items()})
    assert terms[0] == terms[1]
    difference = 0.3 * 0.8 * terms[0]["kl_adapter_weights"]
    assert losses[0] - losses[1] == pytest.approx(difference, rel=1e-4)


def test_a_prior_without_closed_form_divergence_is_estimated_as_pyro_does(network, batch):
    class HeavyTailed(Priors):
        def adapter_weights(self, network):
            return (
                pyro.distributions.StudentT(3.0).expand([network.num_adapter_weights]).to_event(1)
            )

    elbo = TermwiseELBO()
    model, guide = pair(network, priors=HeavyTailed(), normal_weights=True)
    loss = elbo.differentiable_loss(model, guide, batch, LABELS, 0.3)
    penalty = sum(float(v) for name, v in elbo.terms.items() if name != "log_likelihood")
    assert float(loss) == pytest.approx(
        -float(elbo.terms["log_likelihood"]) + 0.3 * penalty, rel=1e-5
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_minibatch_elbos_average_to_that_of_the_full_batch(network, sampled):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (20, 7), generator=generator)
    labels = torch.randint(0, 2, (20,), generator=generator)
    model, guide = pair(network, num_examples=20)
    model.eval()
    with torch.no_grad():
        guide.bit_logits.fill_(0.3)
    gates = None if sampled else guide.decision()
    elbo = TraceMeanField_ELBO()

    def loss(rows):
        pyro.set_rng_seed(3)  # the same draw of the gates for every part
        inputs = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows])}
        return elbo.loss(model, guide, inputs, labels[rows], 1.0, gates)

    parts = [loss(slice(i, i + 5)) for i in range(0, 20, 5)]
    assert sum(parts) / 4 == pytest.approx(loss(slice(None)), rel=1e-6)
    assert max(parts) - min(parts) > 1e-2  # the parts do differ


def test_with_no_data_the_guide_returns_to_an_asymmetric_prior(network, batch):
    """Both gate families of the model, and the normal adapter weights, without a likelihood."""
    gates = IndependentGates(rank_logits=-1.3, bit_logits=lambda layer: 0.01 * layer.out_features)
    priors = Priors(adapter_weight_scale=0.4, gates=gates)
    model, guide = pair(network, priors=priors, normal_weights=True)
    with torch.no_grad():  # near the prior, or gates that close at first have little time to return
        guide.log_scale.fill_(-2.0)
    no_data = poutine.block(model, hide=["label"])
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
    elbo = TraceMeanField_ELBO()
    model.network.forward = lambda batch, latents: torch.zeros(5, 2)  # nothing to learn from
    for step in range(900):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 900)
        loss = elbo.differentiable_loss(no_data, guide, batch, LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    near = {"atol": 2e-3, "rtol": 0}
    torch.testing.assert_close(guide.rank_logits.detach(), model.rank_prior_logits, **near)
    torch.testing.assert_close(guide.bit_logits.detach(), model.bit_prior_logits, **near)
    torch.testing.assert_close(guide.loc.detach(), torch.zeros_like(guide.loc), **near)
    scale = guide.log_scale.detach().exp()
    torch.testing.assert_close(scale, torch.full_like(scale, 0.4), **near)


def test_cost_weighted_logits_fall_by_price_times_what_opening_adds(network):
    prior = CostWeightedGates(rank_logits=0.5, bit_logits=-0.2, price=300.0)
    rank_logits, bit_logits = prior.logits(network, bit_gates=True)
    closed = torch.ones(network.rank_gate_shape)
    closed[4, 1] = 0  # components 2 and 3 of layer 4
    full_bits = torch.ones(network.bit_gate_shape)
    added = relative_bops(network, torch.ones_like(closed), full_bits) - relative_bops(
        network, closed, full_bits
    )
    assert float(rank_logits[4, 1]) == pytest.approx(0.5 - 300 * float(added), abs=2e-4)
    assert (bit_logits < -0.2).all()
    # where bits are not latent, a component costs what it does at 32 bits
    added = relative_bops(network) - relative_bops(network, closed)
    in_full = BayesianLoRA(network, Classification(), Priors(gates=prior), 9, bit_gates=False)
    expected = 0.5 - 300 * float(added)
    assert float(in_full.rank_prior_logits[4, 1]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"price": -1.0}, {"budget": 0.0}, {"budget": 5.0}, {"price": 0.0, "budget": 0.1}]
)
def test_a_price_or_budget_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match=r"price must be >= 0, the budget in|start above 0"):
        GibbsGates(**wrong)


def test_independent_gates_are_decided_at_the_median_of_their_number():
    probs = torch.tensor([[0.55] * 8, [0.9, 0.1, 0.2, 0.6, 0.1, 0.1, 0.1, 0.1]])
    draws = torch.bernoulli(probs.expand(20_001, 2, 8)).sum(-1).median(0).values
    decided = open_up_to_quantile(probs, independent)
    assert decided.sum(-1).tolist() == draws.tolist() == [4, 2]
    assert decided[1].tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


def test_gibbs_factor_is_price_times_share_and_a_budget_moves_the_price(network):
    prior = GibbsGates(price=200.0, budget=0.05)
    half = torch.full(network.bit_gate_shape, 0.5)
    share = relative_bops(network, None, half)
    torch.testing.assert_close(prior.log_factor(network, None, half), -200 * share)
    prior.ascend(share=0.10, rate=0.05)
    assert prior.price > 200
    for _ in range(3):
        prior.ascend(share=0.01, rate=0.05)
    assert prior.price < 200
    fixed = GibbsGates(price=200.0)
    fixed.ascend(share=0.9, rate=0.05)
    assert fixed.price == 200


@pytest.mark.parametrize(("rank_gates", "bit_gates"), [(True, False), (False, True)])
def test_a_method_has_only_its_own_gates(network, batch, rank_gates, bit_gates):
    model, guide = pair(network, rank_gates=rank_gates, bit_gates=bit_gates)
    trace = poutine.trace(model).get_trace(batch, LABELS)
    assert ("rank_gate" in trace.nodes) == rank_gates
    assert ("bit_gate" in trace.nodes) == bit_gates
    decision = guide.decision()
    assert (decision.rank_gate is None, decision.bit_gate is None) == (
        not rank_gates,
        not bit_gates,
    )


def test_decision_is_the_posterior_median(network):
    _, guide = pair(network)
    with torch.no_grad():
        guide.rank_logits[0] = torch.tensor([0.9, 0.8, 0.7]).logit()  # products .9 .72 .504
        guide.rank_logits[1] = torch.tensor([0.9, 0.5, 0.99]).logit()  # products .9 .45 .44
        guide.bit_logits[0, 0] = torch.tensor([0.6, 0.6, 0.99]).logit()  # products .6 .36 .36
    decision = guide.decision()
    assert decision.rank_gate[:2].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert decision.bit_gate[0, 0].tolist() == [1, 0, 0]


def test_gates_held_fixed_are_not_sampled(network, batch):
    model, guide = pair(network)
    fixed = Gates(torch.ones(12, 3), torch.ones(12, 6, 3))
    for program in (model, guide):
        trace = poutine.trace(program).get_trace(batch, LABELS, 1.0, fixed)
        assert "rank_gate" not in trace.nodes
        assert "bit_gate" not in trace.nodes


def test_quantizing_before_calibration_is_an_error(backbone, batch):
    network = AdaptedNetwork(backbone(), rank=3)
    model, _ = pair(network)
    with pytest.raises(RuntimeError, match="calibrate"):
        model(batch)


def test_under_autocast_the_network_is_in_bfloat16_and_the_rest_in_float32(network, batch, alone):
    model, guide = pair(network)
    network.calibrate([batch], guide.loc)
    elbo = TermwiseELBO()
    module = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(elbo(model, guide))
    outputs, lent = [], []
    layer = network.backbone.get_submodule(network.specs[0].path)

    def look(mine, arguments, output):
        outputs.append(output.dtype)
        lent.append(mine.latents)

    handle = layer.register_forward_hook(look)
    torch.manual_seed(3)
    loss = module(batch, LABELS)
    handle.remove()
    loss.backward()
    assert outputs == [torch.bfloat16]
    assert lent[0].component_weights.dtype == torch.float32
    assert {mixture.weights.dtype for mixture in lent[0].mixtures.values()} == {torch.float32}
    assert {term.dtype for term in elbo.terms.values()} == {torch.float32}
    kept = [*guide.parameters(), *network.buffers()]
    assert {tensor.dtype for tensor in kept if tensor.is_floating_point()} == {torch.float32}
    assert {p.grad.dtype for p in guide.parameters()} == {torch.float32}
    torch.manual_seed(3)
    plain = TermwiseELBO()
    plain(model, guide)(batch, LABELS)
    # eight bits of mantissa in the network, none lost anywhere else
    for name, term in elbo.terms.items():
        assert term.item() == pytest.approx(
            plain.terms[name].item(), rel=0.02 if name == "log_likelihood" else 1e-6
        )
