"""How the time of a training step grows with length, rank and depth, and a prediction with draws.

    python benchmarks/growth.py > benchmarks/growth.csv

One of tokens, rank and blocks is changed at a time, the others as in `step_time.py`: PEFT's LoRA,
and ours with every gate decided and with every gate undecided. The rows `draws` are predictions
averaged over draws of all gates; the rows `merged`, those of the bare network (0) and of one at a
decision whose adapters are merged into its weights (1), with the ratio to the bare one. One
process, 2 threads, fp32; medians of steps that are made in turn.
"""

from __future__ import annotations

import argparse
import csv
import sys

import pyro
import torch
from steps import ALPHA, Size, Step, cut, inputs, steps_of, times
from torch.utils.data import DataLoader

from bayes_lora.decided import decide_network
from bayes_lora.inference.draws import draw_posterior, unbound
from bayes_lora.inference.peft_adapter import decided_layers
from bayes_lora.inference.predict import predict_draws
from bayes_lora.inference.quiet import quiet
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork

CELLS = (("peft_lora", "open"), ("qr", "decided"), ("qr", "undecided"))
GROWN = {"tokens": (32, 64, 128, 256), "rank": (2, 8, 32), "blocks": (2, 4, 6)}
DRAWS = (1, 4, 16)


def prediction(draws: int) -> Step:
    """Predictions of one batch at draws of all gates, each open with probability 1/2."""
    size = Size()
    batch = inputs(size.tokens)
    network = AdaptedNetwork(cut(size.blocks).model, rank=size.rank, alpha=ALPHA)
    model = BayesianLoRA(network, Classification(), Priors(), 2000)
    guide = GateGuide(model, network.initial_adapter_weights())
    model.eval()
    network.calibrate([batch], guide.loc)
    with torch.no_grad():
        for logits in (guide.rank_logits, guide.bit_logits):
            logits.zero_()
    gates = unbound(draw_posterior(guide, draws, torch.Generator().manual_seed(0)), draws)
    loader = DataLoader(range(len(batch["labels"])), batch_size=len(batch["labels"]),
                        collate_fn=lambda _: dict(batch))  # fmt: skip
    weights = [guide.loc.detach()] * draws
    return lambda: predict_draws(model, guide, loader, gates, weights) and None


def prediction_when_merged(merged: bool) -> Step:
    """Predictions of one batch by the bare network, or by one with merged adapters."""
    size = Size()
    batch = inputs(size.tokens)
    batch.pop("labels")
    model = cut(size.blocks).model.eval()
    if merged:
        network = AdaptedNetwork(model, rank=size.rank, alpha=ALPHA)
        weights = network.initial_adapter_weights()
        network.calibrate([batch], weights)
        draw = torch.Generator().manual_seed(1)
        shapes = (network.rank_gate_shape, network.bit_gate_shape)
        gates = (torch.bernoulli(torch.full(shape, 0.5), generator=draw) for shape in shapes)
        model = decide_network(network, weights, *gates)
        for path, layer in decided_layers(model).items():
            model.set_submodule(path, layer.merged())
    return torch.no_grad()(lambda: model(**batch) and None)


def main() -> None:
    """Print the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(2)
    pyro.settings.set(module_local_params=True)
    quiet()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    print("# python benchmarks/growth.py", *sys.argv[1:])
    writer.writerow(["grown", "value", "variant", "phase", "median_s", "ratio_to_peft_lora"])
    for name, values in GROWN.items():
        for value in values:
            size = Size(**{name: value})
            cells = [steps_of(*cell, size, torch.float32, []) for cell in CELLS]
            for cell, (m, ratio) in zip(CELLS, times(cells, options.repeats), strict=True):
                writer.writerow([name, value, *cell, f"{m:.4f}", f"{ratio:.3f}"])
            sys.stdout.flush()
    found = times([[prediction(draws)] for draws in DRAWS], options.repeats)
    for draws, (m, _) in zip(DRAWS, found, strict=True):
        writer.writerow(["draws", draws, "qr", "predict", f"{m:.4f}", ""])
    found = times([[prediction_when_merged(merged)] for merged in (False, True)], 41)
    for merged, (m, ratio) in enumerate(found):
        writer.writerow(["merged", merged, "qr", "predict", f"{m:.4f}", f"{ratio:.3f}"])


if __name__ == "__main__":
    main()
