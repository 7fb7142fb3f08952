"""Ranks that are known, and what the posterior says of them.

    python benchmarks/planted_rank.py > benchmarks/planted_rank.csv

A BERT of one small block gets adapters of known rank, 0 to 4, drawn for each of its six layers;
with noise on top, what it then computes is the target of a regression. The same BERT with empty
adapters of rank 6 is trained on that by SVI, with a normal posterior of the adapter weights,
which makes a component that is not needed cost something. The gates start at their prior, so
that components are added in order, and are refined to discrete ones at the end. One line a seed
and layer: the rank planted; the mode of its posterior, the probability that this posterior
gives to ranks within one of the planted, and its central 90 % interval; the same for the
mixture of all restarts.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import pyro
import torch
from accelerate import Accelerator
from planted import KnownNoise, random_texts, small_bert
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bayes_lora.gates import rank_probabilities
from bayes_lora.inference.optimisation import Optimisation, gate_learning_rate
from bayes_lora.inference.phases import plan
from bayes_lora.inference.refine import refine_guide
from bayes_lora.inference.train import fit
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import IndependentGates, Priors
from bayes_lora.network import AdaptedNetwork, Latents

EXAMPLES, BLOCKS, OUTPUTS, NOISE = 2000, 1, 32, 0.3
RANK, MOST_PLANTED = 6, 4


def planted(network: AdaptedNetwork, ranks: Tensor, generator: torch.Generator) -> Latents:
    """Adapters of the given ranks, all their components of the same size."""
    parts = []
    for spec in network.specs:
        A = torch.randn(RANK, spec.in_features, generator=generator) / spec.in_features**0.5
        B = 0.5 * torch.randn(spec.out_features, RANK, generator=generator)
        parts += [A.flatten(), torch.ones(RANK), B.flatten()]
    return Latents(torch.cat(parts), (torch.arange(RANK) < ranks[:, None]).float())


def task(seed: int) -> tuple[AdaptedNetwork, list[dict[str, Tensor]], Tensor]:
    """The network, the examples, and the planted ranks (L,)."""
    generator = torch.Generator().manual_seed(seed)
    backbone = small_bert(BLOCKS, OUTPUTS, seed)
    network = AdaptedNetwork(backbone, rank=RANK, alpha=float(RANK))
    network.eval()
    ranks = torch.randint(MOST_PLANTED + 1, (len(network.specs),), generator=generator)
    batch = random_texts(EXAMPLES, generator)
    with torch.no_grad():
        clean = network(batch, planted(network, ranks, generator))
    labels = clean + NOISE * torch.randn(clean.shape, generator=generator)
    columns = batch | {"labels": labels}
    examples = [{name: column[i] for name, column in columns.items()} for i in range(EXAMPLES)]
    return network, examples, ranks


def rank_posterior(
    network: AdaptedNetwork, examples: list[dict[str, Tensor]], seed: int, steps: int
) -> Tensor:
    """Posterior of every layer's rank, shape (L, R + 1), as one run finds it."""
    pyro.set_rng_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(examples, 200, shuffle=True, generator=generator)  # type: ignore[arg-type]
    priors = Priors(gates=IndependentGates(), adapter_weight_scale=0.3)
    model = BayesianLoRA(network, KnownNoise(NOISE), priors, EXAMPLES, bit_gates=False)
    guide = GateGuide(model, network.initial_adapter_weights(generator), normal_weights=True)
    with torch.no_grad():
        guide.rank_logits.copy_(model.rank_prior_logits)
        guide.log_scale.fill_(math.log(0.02))
    phases = plan(steps, (0.0, 0.3, 0.7), gated=True)
    optimisation = Optimisation(0.01, gate_learning_rate(phases))
    fit(model, guide, loader, phases, optimisation, Accelerator(cpu=True))
    refine_guide(model, guide, DataLoader(examples, 200), passes=80)  # type: ignore[arg-type]
    return rank_probabilities(guide.open_probabilities().rank_gate)


def one_seed(seed: int, restarts: int, steps: int) -> tuple[Tensor, Tensor]:
    """The planted ranks (L,), and their posterior in every restart, (restarts, L, R + 1)."""
    network, examples, ranks = task(seed)
    with pyro.settings.context(module_local_params=True):
        runs = [rank_posterior(network, examples, seed + 1000 * k, steps) for k in range(restarts)]
    return ranks, torch.stack(runs)


def columns(posterior: Tensor, truth: int) -> tuple[list[str], bool, bool]:
    """Mode, probability within one, central 90 % interval; and is the truth near, is it inside."""
    at_most = posterior.cumsum(-1)
    low, high = int((at_most < 0.05).sum()), int((at_most < 0.95).sum())
    mode = int(posterior.argmax())
    near = posterior[max(truth - 1, 0) : truth + 2].sum()
    return (
        [str(mode), f"{float(near):.4f}", str(low), str(high)],
        abs(mode - truth) <= 1,
        low <= truth <= high,
    )


def main() -> None:
    """Print the table as CSV, and a summary to the other stream."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="one seed in each")
    options = parser.parse_args()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    print("# python benchmarks/planted_rank.py", *sys.argv[1:])
    names = ["mode", "p_within_one", "low", "high"]
    writer.writerow(["seed", "layer", "planted", *names, *(f"mixture_{name}" for name in names)])
    judged = []
    work = [(seed, options.restarts, options.steps) for seed in range(options.seeds)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawn, torch.set_num_threads, (1,)) as pool:
        found = pool.map(one_seed, *zip(*work, strict=True))
        found = tqdm(found, total=len(work), disable=None, unit="seed")
        for seed, (ranks, runs) in enumerate(found):
            for layer, truth in enumerate(ranks.tolist()):
                one, near, covered = columns(runs[0, layer], truth)
                mixed, mixed_near, mixed_covered = columns(runs[:, layer].mean(0), truth)
                writer.writerow([seed, layer, truth, *one, *mixed])
                judged.append([near, covered, mixed_near, mixed_covered])
            sys.stdout.flush()
    near, covered, mixed_near, mixed_covered = torch.tensor(judged).double().mean(0).tolist()
    print(
        f"of {len(judged)} layers, mode within one: {near:.3f}, truth in the interval: "
        f"{covered:.3f}; of the mixture: {mixed_near:.3f}, {mixed_covered:.3f}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
