"""Relaxed and refined guide against the exact posterior of the ranks of a linear model.

    python benchmarks/exact_posterior.py > benchmarks/exact_posterior.csv

The model is y = sum over layers and components of g_lk w_lk x_lk + noise, with known weights w
and nested gates g, or a logistic regression on the same sum. For one layer all ranks are summed.
For twelve layers of eight gates the reference is Gibbs sampling, each layer's rank drawn from its
exact conditional; `exact mean field` is the optimum of all guides with independent layers, found
by coordinate ascent. What is shown is the total variation distance between distributions of the
rank, mean and largest over layers and seeds.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn.functional import softplus

from bayes_lora.distributions import HardConcrete
from bayes_lora.gates import nested, rank_probabilities
from bayes_lora.inference.natural_gradient import GateSet, ascend

SIGNALS = {
    "strong": [1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
    "weak": [0.6, 0.4, 0.3, 0.2, 0.1, 0.05],
    "spread": [0.3] * 6,
}
EXAMPLES, NOISE, TEMPERATURE = 400, 3.0, 2 / 3


def make(weights: Tensor, kind: str, seed: int) -> Callable[[Tensor], Tensor]:
    """Log likelihood in nats, shape (...), of component weights g (..., L, R)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, *weights.shape, generator=generator, dtype=torch.double)
    score = (x * weights).sum((-1, -2))
    if kind == "logistic":
        y = torch.bernoulli(score.sigmoid(), generator=generator)
    else:
        y = score + NOISE * torch.randn(EXAMPLES, generator=generator, dtype=torch.double)

    def log_likelihood(components: Tensor) -> Tensor:
        found = torch.einsum("...lk,nlk->...n", components * weights, x)
        if kind == "logistic":
            return (y * found - softplus(found)).sum(-1)
        return -0.5 * ((y - found) ** 2).sum(-1) / NOISE**2

    return log_likelihood


def relaxed(log_likelihood: Callable[[Tensor], Tensor], prior: Tensor, seed: int) -> Tensor:
    """Logits of a hard concrete guide after 4,000 steps of Adam, as in training."""
    torch.manual_seed(seed)
    logits = torch.full_like(prior, 4.0).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(4000):
        guide = HardConcrete(TEMPERATURE, logits=logits)
        kl = kl_divergence(guide, HardConcrete(TEMPERATURE, logits=prior)).sum()
        loss = kl - log_likelihood(nested(guide.rsample()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach()


def refined(
    log_likelihood: Callable[[Tensor], Tensor], prior: Tensor, start: Tensor, seed: int, size: int
) -> Tensor:
    """Logits after `size` iterations of 4 draws."""
    gates = GateSet(start.clone(), prior, bends=False)  # as of a rank gate
    generator = torch.Generator().manual_seed(seed)
    ascend(lambda z: log_likelihood(nested(z)), lambda p: None, [gates], size, generator=generator)
    return gates.logits


def mean_field(log_likelihood: Callable[[Tensor], Tensor], prior: Tensor) -> Tensor:
    """P(rank) of every layer, shape (L, R + 1), in the best product of distributions over layers.

    By coordinate ascent. As the log likelihood is quadratic, what a layer sees of the others is
    the mean of their component weights. It is the limit of any guide whose layers are independent.
    """
    layers, size = prior.shape
    ranks = (torch.arange(size) < torch.arange(size + 1)[:, None]).double()
    log_prior = rank_probabilities(prior.sigmoid()).log()
    found = torch.full((layers, size + 1), 1 / (size + 1), dtype=torch.double)
    for _ in range(500):
        for layer in range(layers):
            options = (found @ ranks).expand(size + 1, -1, -1).clone()
            options[:, layer] = ranks
            found[layer] = torch.softmax(log_likelihood(options) + log_prior[layer], -1)
    return found


def gibbs(
    log_likelihood: Callable[[Tensor], Tensor], prior: Tensor, seed: int, sweeps: int = 3000
) -> Tensor:
    """P(rank) of every layer, shape (L, R + 1), from conditionals averaged over sweeps."""
    generator = torch.Generator().manual_seed(seed)
    layers, size = prior.shape
    ranks = (torch.arange(size) < torch.arange(size + 1)[:, None]).double()
    log_prior = rank_probabilities(prior.sigmoid()).log()
    gates = torch.ones_like(prior)
    total = torch.zeros(layers, size + 1, dtype=torch.double)
    for sweep in range(sweeps):
        for layer in range(layers):
            options = gates.expand(size + 1, -1, -1).clone()
            options[:, layer] = ranks
            p = torch.softmax(log_likelihood(options) + log_prior[layer], -1)
            gates[layer] = ranks[int(torch.multinomial(p, 1, generator=generator))]
            total[layer] += p * (sweep >= sweeps // 10)
    return total / total.sum(-1, keepdim=True)


def distance(found: Tensor, exact: Tensor) -> Tensor:
    """Total variation between distributions of the rank (L, R + 1), shape (L,)."""
    return 0.5 * (found - exact).abs().sum(-1)


def main() -> None:
    """Print the table as CSV."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    print("# python benchmarks/exact_posterior.py")
    writer.writerow(["layers", "likelihood", "signal", "guide", "mean", "largest"])
    guides: dict[str, Callable[..., Tensor]] = {
        "relaxed": lambda likelihood, prior, start, seed: start,
        **{f"refined {n}": partial(refined, size=n) for n in (100, 300, 1000)},
    }
    for kind in ("normal", "logistic"):
        for name, signal in SIGNALS.items():
            found: dict[str, list[Tensor]] = {guide: [] for guide in guides}
            for seed in range(4):
                prior = torch.tensor([[0.7, 0.0, -0.4, 0.2, 0.0, -0.3]], dtype=torch.double)
                likelihood = make(torch.tensor([signal], dtype=torch.double), kind, seed)
                exact = gibbs(likelihood, prior, seed, sweeps=10)  # of one layer: the posterior
                start = relaxed(likelihood, prior, seed)
                for guide, logits in guides.items():
                    moved = logits(likelihood, prior=prior, start=start, seed=seed)
                    found[guide].append(distance(rank_probabilities(moved.sigmoid()), exact))
            report(writer, [1, kind, name], found)
    found = {guide: [] for guide in (*guides, "exact mean field")}
    for seed in range(4):
        generator = torch.Generator().manual_seed(100 + seed)
        weights = torch.rand(12, 8, generator=generator, dtype=torch.double)
        weights = weights.sort(-1, descending=True).values * 0.6
        prior = torch.full((12, 8), -0.2, dtype=torch.double)
        likelihood = make(weights, "normal", seed)
        exact = gibbs(likelihood, prior, seed)
        start = relaxed(likelihood, prior, seed)
        for guide, logits in guides.items():
            moved = logits(likelihood, prior=prior, start=start, seed=seed)
            found[guide].append(distance(rank_probabilities(moved.sigmoid()), exact))
        found["exact mean field"].append(distance(mean_field(likelihood, prior), exact))
    report(writer, [12, "normal", "mixed"], found)


def report(writer: object, labels: list[object], found: dict[str, list[Tensor]]) -> None:
    """Write one line a guide."""
    for guide, distances in found.items():
        values = torch.cat(distances)
        row = [*labels, guide, f"{values.mean():.4f}", f"{values.max():.4f}"]
        writer.writerow(row)  # type: ignore[attr-defined]
        sys.stdout.flush()


if __name__ == "__main__":
    main()
