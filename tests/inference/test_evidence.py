"""The ELBO against the exact log evidence of a linear model with unknown rank and weights.

    y = z1 w1 x1 + z1 z2 w2 x2 + noise,    w ~ Normal(0, s),    gates z nested

Given the rank everything is normal, so the evidence of every rank is known.
"""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.distributions import Normal, kl_divergence

from bayes_lora.gated_normal import GatedNormal
from bayes_lora.gates import nested, rank_probabilities
from bayes_lora.inference.natural_gradient import GateSet, ascend, divergence

EXAMPLES, NOISE, SCALE = 40, 1.5, 0.6
PRIOR_LOGITS = torch.tensor([0.4, -0.7], dtype=torch.double)


def data(correlation):
    """Columns x1, x2 of unit mean square and exactly this correlation, and y."""
    numbers = np.random.default_rng(4)
    q, _ = np.linalg.qr(numbers.normal(size=(EXAMPLES, 2)))
    x = q * EXAMPLES**0.5
    x[:, 1] = correlation * x[:, 0] + (1 - correlation**2) ** 0.5 * x[:, 1]
    y = x @ np.array([0.6, 0.4]) + NOISE * numbers.normal(size=EXAMPLES)
    return x, y


def exact(x, y):
    """Log evidence, and the posterior of rank 0, 1, 2."""
    log_joint = []
    prior = rank_probabilities(PRIOR_LOGITS.sigmoid())
    for rank in range(3):
        used = x[:, :rank]
        covariance = NOISE**2 * np.eye(EXAMPLES) + SCALE**2 * used @ used.T
        log_joint += [multivariate_normal(cov=covariance).logpdf(y) + float(prior[rank].log())]
    evidence = np.logaddexp.reduce(log_joint)
    return evidence, np.exp(log_joint - evidence)


def guide(x, y):
    """P(rank) and the ELBO of the best guide with gated normal weights, by coordinate ascent."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    prior = torch.distributions.Independent(Normal(torch.zeros(2).double(), SCALE), 1)
    gates = GateSet(torch.zeros(2, dtype=torch.double), PRIOR_LOGITS, bends=False)
    precision = 1 / SCALE**2 + (x**2).sum(0) / NOISE**2
    loc, scale = torch.zeros(2, dtype=torch.double), precision.rsqrt()

    def log_likelihood(z):
        """Expected over the weights: a quadratic in every gate."""
        g = nested(z)
        rest = y - x @ (g * loc)
        squares = (rest**2).sum() + (g**2 * scale**2 * (x**2).sum(0)).sum()
        return -0.5 * squares / NOISE**2 - EXAMPLES * np.log(NOISE * (2 * np.pi) ** 0.5)

    def log_factor(p):
        return -kl_divergence(GatedNormal(loc, scale, nested(p)), prior)

    for _ in range(8):
        p = nested(gates.logits.sigmoid())
        # weight 2 is used only where weight 1 is; weight 1 also without weight 2
        share = torch.stack([p[1] / p[0], torch.ones(()).double()])
        for k in (0, 1):
            rest = y - x[:, 1 - k] * loc[1 - k] * share[k]
            loc[k] = (x[:, k] @ rest) / NOISE**2 / precision[k]
        generator = torch.Generator().manual_seed(0)
        ascend(log_likelihood, log_factor, [gates], 100, draws=8, generator=generator)
    p = gates.logits.sigmoid()
    ranks = rank_probabilities(p)
    configurations = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]).double()
    likelihood = torch.stack([log_likelihood(z) for z in configurations])
    return ranks, float(ranks @ likelihood + log_factor(p) - divergence(gates)[0])


def test_elbo_is_the_log_evidence_where_the_guide_can_be_exact():
    x, y = data(correlation=0.0)
    evidence, posterior = exact(x, y)
    ranks, elbo = guide(x, y)
    # gates are drawn: logits are off by some 0.01, and the ELBO by a quarter of their square
    assert ranks.tolist() == pytest.approx(posterior.tolist(), abs=5e-3)
    assert elbo == pytest.approx(evidence, abs=1e-4)
    assert 0.1 < posterior.max() < 0.9  # no rank is certain


def test_elbo_is_below_the_log_evidence_where_it_cannot():
    x, y = data(correlation=0.6)
    evidence, posterior = exact(x, y)
    ranks, elbo = guide(x, y)
    assert 0.005 < evidence - elbo < 0.5
    assert 0.5 * abs(ranks.numpy() - posterior).sum() < 0.1
