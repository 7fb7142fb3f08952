"""Simulation-based calibration of the posterior of the rank.

    python benchmarks/simulation_based_calibration.py > benchmarks/simulation_based_calibration.csv

Draw a rank from the prior and data from the linear model of `exact_posterior.py`, find the guide,
draw 99 ranks from it, and see where among them the true one lies: if the guide is the posterior,
all 100 places are equally probable. What is shown is the number of places in each tenth, with the
central 99 % band of a binomial variable, and the p value of a chi-square test that they are
uniform. The simulations know nothing of each other, so they are layers of one guide.

Source: Talts et al., arXiv 1804.06788.
"""

from __future__ import annotations

import argparse
import csv
import sys

import torch
from exact_posterior import NOISE, refined, relaxed
from scipy.stats import binom, chisquare
from torch import Tensor

from bayes_lora.gates import rank_probabilities

WEIGHTS = torch.tensor([0.6, 0.4, 0.3, 0.2, 0.1, 0.05], dtype=torch.double)
PRIOR = torch.tensor([0.7, 0.0, 0.9, 0.2, 1.0, -0.3], dtype=torch.double)
EXAMPLES, DRAWS, BINS = 400, 99, 10


def simulate(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """True ranks (S,), and of y = sum_k g_k w_k x_k + noise the products x'x (S, 6, 6), x'y."""
    prior = rank_probabilities(PRIOR.sigmoid())
    ranks = torch.multinomial(prior, size, replacement=True, generator=generator)
    gates = (torch.arange(len(PRIOR)) < ranks[:, None]).double()
    x = torch.randn(size, EXAMPLES, len(PRIOR), generator=generator, dtype=torch.double)
    noise = torch.randn(size, EXAMPLES, generator=generator, dtype=torch.double)
    y = torch.einsum("snk,sk->sn", x, gates * WEIGHTS) + NOISE * noise
    return ranks, torch.einsum("snj,snk->sjk", x, x), torch.einsum("snk,sn->sk", x, y)


def place(true: Tensor, probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Where the true ranks lie among draws, 0 ... DRAWS, shape (S,); ties are broken at random."""
    draws = torch.multinomial(probabilities, DRAWS, replacement=True, generator=generator)
    below, ties = ((f(draws, true[:, None])).sum(-1) for f in (torch.lt, torch.eq))
    return below + (torch.rand(len(true), generator=generator) * (ties + 1)).long()


def main() -> None:
    """Print the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--simulations", type=int, default=2000)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    true, xx, xy = simulate(options.simulations, generator)

    def log_likelihood(components: Tensor) -> Tensor:
        w = components * WEIGHTS
        squares = torch.einsum("sj,sjk,sk->s", w, xx, w) - 2 * (w * xy).sum(-1)
        return -0.5 * squares.sum() / NOISE**2

    prior = PRIOR.expand(options.simulations, -1)
    start = relaxed(log_likelihood, prior, seed=0)
    guides = {
        "relaxed": start,
        "refined": refined(log_likelihood, prior, start, seed=0, size=300),
    }
    exact = torch.stack([prior_and_data(k, xx, xy) for k in range(len(PRIOR) + 1)], -1).softmax(-1)
    found = {"exact": exact}
    found |= {name: rank_probabilities(logits.sigmoid()) for name, logits in guides.items()}
    low, high = binom.interval(0.99, options.simulations, 1 / BINS)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    print("# python benchmarks/simulation_based_calibration.py", *sys.argv[1:])
    print(f"# {options.simulations} simulations; 99 % band of a tenth: {low:.0f} to {high:.0f}")
    writer.writerow(["guide", *(f"tenth_{k + 1}" for k in range(BINS)), "p_uniform"])
    for name, probabilities in found.items():
        places = place(true, probabilities, generator)
        counts = torch.histc(places.float(), BINS, 0, DRAWS + 1).int().tolist()
        writer.writerow([name, *counts, f"{chisquare(counts).pvalue:.3g}"])


def prior_and_data(rank: int, xx: Tensor, xy: Tensor) -> Tensor:
    """Log of prior times likelihood of one rank, up to a constant, shape (S,)."""
    w = WEIGHTS * (torch.arange(len(WEIGHTS)) < rank)
    squares = torch.einsum("j,sjk,k->s", w, xx, w) - 2 * (xy * w).sum(-1)
    return rank_probabilities(PRIOR.sigmoid())[rank].log() - 0.5 * squares / NOISE**2


if __name__ == "__main__":
    main()
