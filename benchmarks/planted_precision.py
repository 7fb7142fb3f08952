"""Weights that lie on a grid of b bits, and what the posterior says of their bits.

    python benchmarks/planted_precision.py > benchmarks/planted_precision.csv

Every weight of a small BERT is rounded to 2, 4 or 8 bits, drawn layer by layer, and what the
network then computes, with noise on top, is the target of a regression. The posterior of the bits
of all layers is found by refinement from open gates. More than b bits are as good as b, and less
probable a priori; fewer are found where the likelihood does not care. The reference is Gibbs
sampling, every layer's bits drawn from their exact conditional. One line a level of noise: the
share of layers whose most probable bits are b, are fewer, are more; the mean posterior probability
of b, by refinement and by the reference; their total variation distance, mean and largest.
"""

from __future__ import annotations

import argparse
import csv
import sys

import torch
from exact_posterior import distance
from planted import KnownNoise, random_texts, small_bert
from torch import Tensor
from tqdm.auto import tqdm

from bayes_lora.gates import rank_probabilities
from bayes_lora.inference.refine import DRAWS, refine_guide
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import IndependentGates, Priors
from bayes_lora.network import AdaptedNetwork, Latents
from bayes_lora.quantization import quantize
from bayes_lora.ranges import searched_limits

EXAMPLES, BLOCKS, OUTPUTS = 300, 2, 16
NOISES = (0.03, 0.3, 3.0)
PRIOR_LOGIT = -2.0
WIDTHS = (2, 4, 8, 16)


def make(seed: int, noise: float) -> tuple[BayesianLoRA, GateGuide, dict[str, Tensor], Tensor]:
    """Model, guide, data with `labels`, and the bits planted, an index of `WIDTHS` (L,)."""
    generator = torch.Generator().manual_seed(seed)
    backbone = small_bert(BLOCKS, OUTPUTS, seed)
    network = AdaptedNetwork(backbone, rank=1, quantized_tensors=("weight",)).eval()
    planted = torch.randint(3, (len(network.specs),), generator=generator)
    with torch.no_grad():
        for spec, level in zip(network.specs, planted.tolist(), strict=True):
            weight = network.backbone.get_submodule(spec.path).weight
            (limit,) = searched_limits(weight, (1,), WIDTHS[level : level + 1])
            weight.copy_(quantize(weight, limit, WIDTHS[level]))
    batch = random_texts(EXAMPLES, generator)
    weights = network.initial_adapter_weights(generator)  # B is zero: the adapters do nothing
    with torch.no_grad():
        clean = network(batch, Latents(weights))
    labels = clean + noise * torch.randn(clean.shape, generator=generator)
    priors = Priors(gates=IndependentGates(bit_logits=PRIOR_LOGIT))
    model = BayesianLoRA(network, KnownNoise(noise), priors, EXAMPLES, rank_gates=False)
    network.calibrate([batch], weights)
    return model, GateGuide(model, weights), batch | {"labels": labels}, planted


@torch.no_grad()
def gibbs(model: BayesianLoRA, weights: Tensor, data: dict[str, Tensor], sweeps: int) -> Tensor:
    """P(bits) of every layer, shape (L, 4), from conditionals averaged over sweeps."""
    batch = {name: value for name, value in data.items() if name != "labels"}
    options = (torch.arange(3) < torch.arange(4)[:, None]).float()  # gates of every width
    log_prior = rank_probabilities(model.bit_prior_logits.sigmoid()).log()[:, 0]
    gates = torch.ones(model.network.bit_gate_shape)
    total = torch.zeros(len(gates), 4)
    for sweep in range(sweeps):
        for layer in range(len(gates)):
            found = []
            for option in options:
                gates[layer, 0] = option
                output = model.network(batch, Latents(weights, *Gates(None, gates)))
                found.append(model.likelihood(output).log_prob(data["labels"]).sum())
            p = torch.softmax(torch.stack(found) + log_prior[layer], -1)
            gates[layer, 0] = options[int(torch.multinomial(p, 1))]
            total[layer] += p * (sweep >= sweeps // 10)
    return total / total.sum(-1, keepdim=True)


def main() -> None:
    """Print the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--sweeps", type=int, default=100)
    options = parser.parse_args()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    print("# python benchmarks/planted_precision.py", *sys.argv[1:])
    writer.writerow(
        ["noise", "mode_b", "mode_fewer", "mode_more", "p_b", "reference_p_b", "mean", "largest"]
    )
    for noise in NOISES:
        truths, refined, reference = [], [], []
        for seed in tqdm(range(options.seeds), disable=None, desc=f"noise {noise}"):
            model, guide, data, planted = make(seed, noise)
            refine_guide(model, guide, [data], DRAWS * options.iterations)
            _, bits = guide.open_probabilities()
            truths.append(planted)
            refined.append(rank_probabilities(bits[:, 0]))
            reference.append(gibbs(model, guide.loc, data, options.sweeps))
        truth, found, exact = torch.cat(truths), torch.cat(refined), torch.cat(reference)
        mode = found.argmax(-1)
        distances = distance(found, exact)
        p_b = [float(p[torch.arange(len(truth)), truth].mean()) for p in (found, exact)]
        shares = [float((x).float().mean()) for x in (mode == truth, mode < truth, mode > truth)]
        numbers = [*shares, *p_b, float(distances.mean()), float(distances.max())]
        writer.writerow([noise, *(f"{number:.3f}" for number in numbers)])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
