"""Refinement against exact posteriors: all configurations summed, or exact coordinate ascent."""

import pytest
import torch
from torch.nn.functional import softplus

from bayes_lora.errors import NumericalError
from bayes_lora.gates import independent, nested, rank_probabilities
from bayes_lora.inference.natural_gradient import MIDPOINTS, GateSet, ascend, divergence

STRONG, WEAK, SPREAD = [1.0, 1, 1, 0, 0, 0], [0.6, 0.4, 0.3, 0.2, 0.1, 0.05], [0.3] * 6


def distance(p, q):
    return 0.5 * (p - q).abs().sum(-1)


def data(signal, kind, seed, size=400, noise=3.0):
    """Log likelihood of nested gates on a linear predictor with known weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(signal, dtype=torch.double)
    x = torch.randn(size, len(signal), generator=generator, dtype=torch.double)
    score = x @ weights
    if kind == "logistic":
        y = torch.bernoulli(score.sigmoid(), generator=generator)
    else:
        y = score + noise * torch.randn(size, generator=generator, dtype=torch.double)

    def log_likelihood(gates):
        found = (nested(gates) * weights) @ x.T
        if kind == "logistic":
            return (y * found - softplus(found)).sum(-1)
        return -0.5 * ((y - found) ** 2).sum(-1) / noise**2

    return log_likelihood


@pytest.mark.parametrize("kind", ["logistic", "normal"])
@pytest.mark.parametrize("signal", [STRONG, WEAK, SPREAD], ids=["strong", "weak", "spread"])
def test_one_layer_finds_the_exact_posterior_of_its_rank(signal, kind):
    prior_logits = torch.tensor([0.7, 0.0, -0.4, 0.2, 0.0, -0.3], dtype=torch.double)
    size = len(signal)
    ranks = (torch.arange(size) < torch.arange(size + 1)[:, None]).double()
    for seed in range(2):
        log_likelihood = data(signal, kind, seed)
        prior = rank_probabilities(prior_logits.sigmoid())
        exact = torch.softmax(log_likelihood(ranks) + prior.log(), -1)
        gates = GateSet(torch.full((size,), 4.0, dtype=torch.double), prior_logits, bends=False)
        generator = torch.Generator().manual_seed(seed)
        ascend(log_likelihood, lambda p: None, [gates], 1000, draws=4, generator=generator)
        assert distance(rank_probabilities(gates.logits.sigmoid()), exact) <= 0.02


def evidence_gap(log_likelihood, gates, size):
    """Exact log evidence less the ELBO of one layer of nested gates, nats."""
    ranks = (torch.arange(size) < torch.arange(size + 1)[:, None]).double()
    prior = rank_probabilities(gates.prior_logits.sigmoid())
    guide = rank_probabilities(gates.logits.sigmoid())
    found = log_likelihood(ranks)
    evidence = torch.logsumexp(found + prior.log(), 0)
    elbo = (guide * (found + prior.log() - guide.log())).sum()
    return float(evidence - elbo)


def test_the_elbo_is_below_the_evidence_and_reaches_it_where_the_guide_can_be_exact():
    prior_logits = torch.tensor([0.7, 0.0, -0.4, 0.2, 0.0, -0.3], dtype=torch.double)
    log_likelihood = data(WEAK, "logistic", seed=1)
    gates = GateSet(torch.full((6,), 4.0, dtype=torch.double), prior_logits, bends=False)
    before = evidence_gap(log_likelihood, gates, 6)
    generator = torch.Generator().manual_seed(0)
    ascend(log_likelihood, lambda p: None, [gates], 300, draws=4, generator=generator)
    after = evidence_gap(log_likelihood, gates, 6)
    assert before > 0.5
    assert 0 <= after < 0.005


def test_without_data_gates_return_to_an_asymmetric_prior_and_what_couples_it():
    """The prior is exp(-price * rank) on top of its logits; one layer of it can be summed."""
    prior_logits = torch.tensor([1.2, -0.5, 0.4], dtype=torch.double)
    price = 0.8
    gates = GateSet(torch.full((3,), 4.0, dtype=torch.double), prior_logits)
    ascend(
        lambda z: 0 * z.sum(), lambda p: -price * nested(p).sum(), [gates], 200, draws=2
    )  # fmt: skip
    prior = rank_probabilities(prior_logits.sigmoid())
    exact = torch.softmax(prior.log() - price * torch.arange(4), -1)
    assert distance(rank_probabilities(gates.logits.sigmoid()), exact) < 1e-6


def test_gates_that_are_independent_are_all_reached():
    prior_logits = torch.tensor([1.2, -0.5, 0.4], dtype=torch.double)
    slopes = torch.tensor([0.3, -1.0, 2.0], dtype=torch.double)
    gates = GateSet(torch.zeros(3, dtype=torch.double), prior_logits, independent)
    ascend(lambda z: (z * slopes).sum(), lambda p: None, [gates], 200, draws=2)
    assert torch.allclose(gates.logits, prior_logits + slopes, atol=1e-6)


def test_simpsons_rule_where_the_likelihood_bends():
    """A polynomial of degree four is integrated exactly; the trapezoid rule would give 3/2."""
    gates = GateSet(torch.zeros(1, dtype=torch.double), torch.tensor([0.4], dtype=torch.double))
    ascend(lambda z: (z**4 - z**3 + z**2).sum(), lambda p: None, [gates], 200, draws=4)
    assert torch.allclose(gates.logits, gates.prior_logits + 1.0, atol=1e-6)


def test_a_gate_that_is_certain_is_never_at_half():
    """Log likelihood 10 z1 z2 with z2 open for sure: a slope of 10, not of 5, at every draw."""
    gates = GateSet(torch.zeros(2, 1, dtype=torch.double), torch.tensor([[-9.0], [20.0]]).double())
    gates.logits[1] = 20.0
    ascend(lambda z: 10 * z[0, 0] * z[1, 0], lambda p: None, [gates], 200)
    assert gates.logits[0, 0] == pytest.approx(1.0, abs=1e-6)


def test_what_a_bend_depends_on_biases_it_little():
    """Log likelihood 4 b (3 a^2 - 2 a^3) - 8 b: at a = 1/2 the slope in a is 6 b, at its ends 0.

    The guide has b closed. Where a is put at 1/2, b must not be there too.
    """
    found = []
    for seed in range(6):
        gates = GateSet(torch.full((2, 1), 4.0).double(), torch.zeros(2, 1).double())
        ascend(
            lambda z: 4 * z[1, 0] * (3 * z[0, 0] ** 2 - 2 * z[0, 0] ** 3) - 8 * z[1, 0],
            lambda p: None, [gates], 600, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        found.append(gates.logits[0, 0])
    p_b = torch.tensor(4 * 0.5 - 8.0).sigmoid()  # as a ends near even odds
    bias = 2 / 3 * 6 * 0.5 * MIDPOINTS * 4 * p_b  # b at 1/2 in that share of the middles of a
    error = torch.stack(found).std() / 6**0.5
    assert abs(torch.stack(found).mean() - 4 * p_b) <= bias + 4 * error
    assert bias < 0.01


def test_from_certainty_a_gate_comes_back_in_a_few_iterations():
    gates = GateSet(torch.full((1,), 900.0).double(), torch.zeros(1).double())
    ascend(lambda z: -2 * z.sum(), lambda p: None, [gates], 20)
    assert -2 < gates.logits.item() < 0


def test_few_iterations_do_not_overshoot():
    """The running means of two or three iterations are means."""
    for iterations in (1, 2, 3):
        gates = GateSet(torch.zeros(1, dtype=torch.double), torch.zeros(1, dtype=torch.double))
        slopes = iter(torch.arange(2.0, 50.0))
        ascend(
            lambda z: next(slopes) * z.sum(), lambda p: None, [gates], iterations  # noqa: B023
        )  # fmt: skip
        assert 0 < gates.logits.item() < 0.3 * iterations * (2 + 4 * iterations)


def test_what_is_not_finite_is_an_error():
    gates = GateSet(torch.zeros(1, dtype=torch.double), torch.zeros(1, dtype=torch.double))
    with pytest.raises(NumericalError, match="not finite"):
        ascend(lambda z: (z * float("nan")).sum(), lambda p: None, [gates], 1)


def test_divergence_counts_gates_that_are_reached():
    prior = torch.tensor([0.7, -0.2, 0.4], dtype=torch.double)
    logits = torch.tensor([-0.3, 1.1, 2.0], dtype=torch.double)
    p, q = (rank_probabilities(a.sigmoid()) for a in (prior, logits))
    total, _ = divergence(GateSet(logits, prior))
    assert torch.allclose(total, (q * (q / p).log()).sum())
