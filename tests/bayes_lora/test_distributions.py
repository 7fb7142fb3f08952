"""Hard concrete gates: the published numbers, Monte Carlo, gradients, and what must be refused."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from bayes_lora.distributions import HardConcrete
from bayes_lora.point_mass import PointMass

PAIRS = [(2.0, -1.0), (6.0, -3.0), (12.0, -1.0), (-3.0, 0.5), (0.3, 4.0), (1.0, 1.2)]
# a_q, a_p, hard concrete KL, relaxed Bernoulli KL at temperature 2/3, in nats
TABLE = [
    (2.0, -1.0, 1.243649125113668, 1.3143741789475358),
    (6.0, -3.0, 4.519793451706873, 7.002221650647032),
    (12.0, -1.0, 2.6699455725737, 11.000058768697418),
]


def gate(logit, temperature=2 / 3, dtype=torch.float64):
    return HardConcrete(
        torch.tensor(temperature, dtype=dtype), logits=torch.tensor(logit, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("a_q", "a_p", "hard", "relaxed"), TABLE)
def test_divergences_equal_the_checked_values(a_q, a_p, hard, relaxed, dtype):
    assert float(kl_divergence(gate(a_q, dtype=dtype), gate(a_p, dtype=dtype))) == pytest.approx(
        hard, abs=1e-6
    )
    q, p = (relaxed_bernoulli(a, dtype=dtype) for a in (a_q, a_p))
    assert float(kl_divergence(q, p)) == pytest.approx(relaxed, abs=1e-6)


def relaxed_bernoulli(logit, temperature=2 / 3, dtype=torch.float64):
    return dist.RelaxedBernoulli(
        torch.tensor(temperature, dtype=dtype), logits=torch.tensor(logit, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [gate, relaxed_bernoulli])
@pytest.mark.parametrize("temperature", [0.3, 2 / 3, 1.5])
@pytest.mark.parametrize(("a_q", "a_p"), PAIRS)
def test_divergence_equals_monte_carlo(a_q, a_p, temperature, family, dtype):
    torch.manual_seed(0)
    q, p = family(a_q, temperature, dtype), family(a_p, temperature, dtype)
    if family is relaxed_bernoulli:  # before the sigmoid, where nothing is lost to rounding
        q, p = q.base_dist, p.base_dist
    z = q.sample((200_000,))
    log_ratio = q.log_prob(z) - p.log_prob(z)
    standard_error = float(log_ratio.std()) / math.sqrt(len(z))
    assert abs(float(log_ratio.mean() - kl_divergence(q, p))) < 4 * standard_error


@pytest.mark.parametrize(("a_q", "a_p"), PAIRS)
def test_divergence_equals_an_integral_over_the_interior(a_q, a_p):
    q, p = gate(a_q), gate(a_p)
    # midpoints in the logistic variable, where the integrand is smooth
    l1 = float(q.logit_at_one)
    edges = torch.linspace(-l1, l1, 200_001, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    z = torch.sigmoid(middle / q.temperature) * 1.2 - 0.1
    density = torch.sigmoid(middle - a_q) * torch.sigmoid(a_q - middle)
    interior = (density * (q.log_prob(z) - p.log_prob(z))).sum() * (edges[1] - edges[0])
    atoms = sum(
        mass * (mass.log() - other.log())
        for mass, other in [
            (q.probability_closed, p.probability_closed),
            (q.probability_open, p.probability_open),
        ]
    )
    assert float(kl_divergence(q, p)) == pytest.approx(float(interior + atoms), abs=1e-8)


@pytest.mark.parametrize("family", [HardConcrete, dist.RelaxedBernoulli])
def test_gradient_of_the_divergence_equals_differences_everywhere(family):
    a_q = torch.linspace(-14, 14, 29, dtype=torch.float64, requires_grad=True)
    a_p = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(2 / 3, dtype=torch.float64)

    def divergence(q, p):
        return kl_divergence(family(temperature, logits=q), family(temperature, logits=p))

    assert torch.autograd.gradcheck(divergence, (a_q, a_p))
    exact = torch.autograd.grad(divergence(a_q, a_p).sum(), a_q)[0]
    single = a_q.detach().float().requires_grad_()
    found = torch.autograd.grad(divergence(single, a_p.float()).sum(), single)[0]
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


def test_gradient_of_the_divergence_is_finite_for_very_certain_gates():
    logits = torch.tensor([-200.0, -40.0, -1.0, 40.0, 200.0], requires_grad=True)
    kl = kl_divergence(HardConcrete(2 / 3, logits=logits), HardConcrete(2 / 3, logits=-logits))
    kl.sum().backward()
    assert torch.isfinite(kl).all()
    assert torch.isfinite(logits.grad).all()


def test_divergence_of_equal_gates_is_zero_and_has_no_gradient():
    logits = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    kl = kl_divergence(
        HardConcrete(2 / 3, logits=logits), HardConcrete(2 / 3, logits=logits.detach())
    )
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.zeros(3), atol=1e-7, rtol=0)
    torch.testing.assert_close(logits.grad, torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.2, 2 / 3, 1.0])
def test_atoms_and_decision_have_the_stated_probabilities(temperature):
    torch.manual_seed(1)
    q = HardConcrete(temperature, logits=torch.tensor([-2.0, 0.7, 3.0]))
    z = q.sample((40_000,))
    for drawn, stated in [
        (z == 0, q.probability_closed),
        (z == 1, q.probability_open),
        (z > 0.5, q.probs),
    ]:
        standard_error = (stated * (1 - stated) / len(z)).sqrt()
        assert ((drawn.float().mean(0) - stated).abs() < 4 * standard_error).all()


def test_density_and_atoms_add_up_to_one():
    q = gate(1.3)
    edges = torch.linspace(0, 1, 400_001, dtype=torch.float64)
    density = q.log_prob((edges[1:] + edges[:-1]) / 2).exp()
    total = density.mean() + q.probability_closed + q.probability_open
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_probs_and_logits_agree_and_expand_keeps_them():
    by_probs = HardConcrete(2 / 3, probs=torch.tensor([0.1, 0.7]))
    by_logits = HardConcrete(2 / 3, logits=torch.tensor([0.1, 0.7]).logit())
    torch.testing.assert_close(by_probs.logits, by_logits.logits)
    wide = by_probs.expand((3, 2))
    assert wide.batch_shape == (3, 2)
    assert wide.rsample((5,)).shape == (5, 3, 2)
    torch.testing.assert_close(wide.log_prob(torch.ones(2))[1], by_probs.log_prob(torch.ones(2)))


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="exactly one"):
        HardConcrete(2 / 3)
    with pytest.raises(ValueError, match="temperature"):
        HardConcrete(-1.0, logits=torch.tensor(0.0))
    with pytest.raises(ValueError, match="equal temperatures"):
        kl_divergence(gate(0.0, 0.5), gate(0.0, 0.6))


@pytest.mark.parametrize("family", ["hard concrete", "relaxed Bernoulli"])
def test_with_no_data_the_guide_returns_to_an_asymmetric_prior(family):
    make = {
        "hard concrete": lambda a: HardConcrete(torch.tensor(2 / 3), logits=a),
        "relaxed Bernoulli": lambda a: dist.RelaxedBernoulli(torch.tensor(2 / 3), logits=a),
    }[family]
    prior = torch.tensor([-2.2, 0.4, 1.5])
    pyro.clear_param_store()
    torch.manual_seed(0)

    def model():
        pyro.sample("z", make(prior).to_event(1))

    def guide():
        pyro.sample("z", make(pyro.param("logits", torch.tensor([3.0, 3.0, -3.0]))).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    for _ in range(600):
        svi.step()
    torch.testing.assert_close(pyro.param("logits").detach(), prior, atol=1e-3, rtol=0)


def test_a_prior_without_closed_form_is_an_error():
    pyro.clear_param_store()

    def model():
        pyro.sample("z", dist.Beta(1.0, 1.0))

    def guide():
        pyro.sample("z", HardConcrete(2 / 3, logits=pyro.param("a", torch.tensor(0.5))))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    with pytest.raises(TypeError, match="no closed-form KL from HardConcrete to Beta"):
        svi.step()


@pytest.mark.parametrize("event_dims", [0, 1])  # `to_event` must not bypass the guard
def test_an_elbo_with_a_biased_pathwise_gradient_is_an_error(event_dims):
    pyro.clear_param_store()

    def gate(logits):
        return HardConcrete(2 / 3, logits=logits.expand(20)).to_event(event_dims)

    def model():
        with pyro.plate("gates", 20) if event_dims == 0 else contextlib.nullcontext():
            pyro.sample("z", gate(torch.tensor(-1.0)))

    def guide():
        with pyro.plate("gates", 20) if event_dims == 0 else contextlib.nullcontext():
            pyro.sample("z", gate(pyro.param("a", torch.tensor(0.5))))

    with pytest.raises(TypeError, match="TraceMeanField_ELBO"):
        SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step()


def test_a_point_mass_guide_finds_the_mode_under_validation():
    pyro.clear_param_store()
    torch.manual_seed(0)

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.tensor([1.0, -2.0]))

    def guide():
        pyro.sample("x", PointMass(pyro.param("loc", torch.zeros(2)), event_dim=1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    with pyro.validation_enabled():
        for _ in range(500):
            svi.step()
    # posterior mean of a normal with prior variance 1 and noise variance 1/4
    torch.testing.assert_close(
        pyro.param("loc").detach(), torch.tensor([0.8, -1.6]), atol=1e-3, rtol=0
    )


def test_the_mean_is_that_of_draws_and_has_its_derivative():
    logits = torch.tensor([-7.0, -2.0, 0.4, 3.0, 12.0], dtype=torch.double, requires_grad=True)
    gate = HardConcrete(2 / 3, logits=logits)
    draws = gate.rsample((400_000,))
    error = draws.std(0) / 400_000**0.5
    assert ((draws.mean(0) - gate.mean).abs() < 4.5 * error + 1e-6).all()
    (pathwise,) = torch.autograd.grad(draws.mean(0).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(gate.mean.sum(), logits)
    torch.testing.assert_close(pathwise[1:4], exact[1:4], rtol=0.03, atol=0)
    # P(z > t) = sigmoid(logit - L(t)): far out, the derivative falls as exp(-|logit|)
    far = HardConcrete(2 / 3, logits=torch.tensor([20.0, 21.0], dtype=torch.double))
    gap = 1 - far.mean
    assert float(gap[0] / gap[1]) == pytest.approx(2.718281828, rel=1e-4)
