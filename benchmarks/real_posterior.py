"""Relaxed and refined guide of a real network against all configurations of its last layers.

    bayes-lora finetune --task mrpc --data_dir GLUE --method r --epochs 5 --warmup_share 0.3 \
        --anneal_share 0.2 --joint_share 0.5 --mixed_precision bf16 --output_dir runs/relaxed
    python benchmarks/real_posterior.py runs/relaxed > benchmarks/real_posterior.csv

The run ends with a relaxed posterior: nothing is settled. It is refined here, as `--refine_epochs
3` does, and timed. Of the last block, the three layers behind the attention see one token a text
only, the one that is classified. So their inputs can be kept, and all 9 x 9 x 9 configurations of
the three ranks are summed over the whole training set, weights held at their means. One line a
guide: the mean of the three ranks, and the total variation distance of their distributions from
that sum. `relaxed` is that of the run, `refined` what becomes of it, all gates at once; `from
relaxed` is the refinement of these three alone, in passes over batches of 32, the mean of ten
seeds, or with the whole training set at every draw. Where the three are refined alone, the `others`
of the sum are held at the decision of the run, as they are for the refinement. Where all gates are
refined, the sum is the mean of sums in which the others are drawn from the refined guide, so that
what is judged is the guide of the three, given its own of the others. At last, how far the
refinement moved the distribution of the rank over all layers.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from exact_posterior import distance
from torch import Tensor
from torch.utils.data import DataLoader

from bayes_lora.costs import relative_bops
from bayes_lora.gates import nested, rank_probabilities
from bayes_lora.inference.batches import fixed_batches
from bayes_lora.inference.data import load_task
from bayes_lora.inference.draws import draw_posterior
from bayes_lora.inference.encoding import encode_dataset
from bayes_lora.inference.natural_gradient import GateSet, ascend
from bayes_lora.inference.options import data_seed
from bayes_lora.inference.refine import DRAWS, refine_guide
from bayes_lora.inference.trained import read_run
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.network import Latents

LAYERS = ("attention.output.dense", "intermediate.dense", "output.dense")


PASSES = 3  # of the refinement of all gates
SEEDS = 10
OTHERS = 8  # draws of the other layers' gates
WRITER = csv.writer(sys.stdout, lineterminator="\n")


def load(run: Path) -> tuple[BayesianLoRA, GateGuide, DataLoader, DataLoader]:
    """Model and guide of a finished run; its training set, in order, and as it is refined on."""
    found = read_run(run)
    _, train, _ = load_task(found.config.data, data_seed(found.config.training))
    tokens = encode_dataset(train, found.task, found.processor, found.config.data.max_length)
    collate = transformers.DataCollatorWithPadding(found.processor)
    settings = found.config.training
    batches = fixed_batches(tokens, collate, settings.batch_size, settings.seed)
    return found.model, found.guide, DataLoader(tokens, 64, collate_fn=collate), batches


class Tail:
    """The network behind the attention of its last block, on inputs that are kept.

    They are what the blocks before give at rank gates of all layers, (L, R).
    """

    def __init__(
        self, model: BayesianLoRA, weights: Tensor, gates: Tensor, data: DataLoader
    ) -> None:
        self.model, self.weights, self.gates = model, weights, gates
        bert = model.network.backbone
        self.block, self.pooler, self.classifier = (
            bert.bert.encoder.layer[-1], bert.bert.pooler, bert.classifier
        )  # fmt: skip
        paths = [spec.path for spec in model.network.specs]
        last = [p for p in paths if p.startswith(model.network.specs[-1].block)]
        self.index = torch.tensor([paths.index(f"{model.network.specs[-1].block}.{kind}")
                                   for kind in LAYERS])  # fmt: skip
        assert len(last) == 6, "a BERT, adapted in all linear layers"
        kept: list[tuple[Tensor, Tensor]] = []
        hook = self.block.attention.output.register_forward_pre_hook(
            lambda _, args: kept.append(tuple(x[:, 0].detach().clone() for x in args))
        )
        labels = []
        with torch.no_grad():
            for batch in data:
                labels.append(batch.pop("labels"))
                model.network(batch, Latents(self.weights, self.gates))
        hook.remove()
        self.context, self.residual = (torch.cat(parts) for parts in zip(*kept, strict=True))
        self.labels = torch.cat(labels)

    def log_likelihood(self, gates: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Log likelihood of all examples, from those in `rows`, at gates of the three (3, R)."""
        everything = self.gates.index_copy(0, self.index, gates.float())
        network = self.model.network
        with network._lend(network.unpack(Latents(self.weights, everything))):
            attended = self.block.attention.output(self.context[rows], self.residual[rows])
            hidden = self.block.output(self.block.intermediate(attended), attended)
            logits = self.classifier(self.pooler(hidden[:, None]))
        found = self.model.likelihood(logits).log_prob(self.labels[rows])
        return found.double().mean() * len(self.labels)

    def log_factor(self, probs: Tensor) -> Tensor:
        """Expected log factor of the prior at open probabilities of the three layers (3, R)."""
        everything = self.gates.index_copy(0, self.index, probs.float())
        return self.model.priors.gates.log_factor(self.model.network, everything, None)


@torch.no_grad()
def exact(tail: Tail, prior: Tensor) -> Tensor:
    """Marginal posterior of the three ranks, shape (3, R + 1), by summing all configurations."""
    size = prior.shape[-1]
    ranks = (torch.arange(size) < torch.arange(size + 1)[:, None]).double()
    log_prior = rank_probabilities(prior.sigmoid()).log()
    joint = torch.empty(size + 1, size + 1, size + 1, dtype=torch.double)
    for chosen in itertools.product(range(size + 1), repeat=3):
        gates = ranks[list(chosen)]
        joint[chosen] = tail.log_likelihood(gates) + tail.log_factor(gates)
        joint[chosen] += sum(log_prior[i, k] for i, k in enumerate(chosen))
    joint = torch.softmax(joint.flatten(), 0).view_as(joint)
    return torch.stack([joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1))])


def refined(
    tail: Tail, start: Tensor, prior: Tensor, iterations: int, batch_size: int, seed: int = 0
) -> Tensor:
    """Logits of the three layers after a refinement of their gates alone."""
    gates = GateSet(start.clone(), prior, bends=False)
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(len(tail.labels), generator=generator).split(batch_size)
    turns = itertools.cycle(parts)

    def log_likelihood(z: Tensor) -> Tensor:
        rows = next(turns)
        return tail.log_likelihood(z, rows) * len(rows) / len(tail.labels)

    ascend(
        log_likelihood, tail.log_factor, [gates], iterations, DRAWS, len(parts),
        generator=generator,
    )  # fmt: skip
    return gates.logits


def print_rows(others: str, reference: Tensor, guides: dict[str, list[Tensor]]) -> None:
    """One line for the sum of all configurations, and one a guide, the mean of its logits' rows."""
    rows = {"all configurations": reference[None]}
    rows |= {name: rank_probabilities(torch.stack(x).sigmoid()) for name, x in guides.items()}
    ranks = torch.arange(reference.shape[-1], dtype=torch.double)
    for name, p in rows.items():
        distances = distance(p, reference)
        numbers = [*(p @ ranks).mean(0).tolist(), *distances.mean(0).tolist()]
        WRITER.writerow([others, name, *(f"{number:.3f}" for number in numbers)])
    sys.stdout.flush()


def main() -> None:
    """Print the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    print("# python benchmarks/real_posterior.py", *sys.argv[1:])
    WRITER.writerow(["others", "guide", *(f"mean_rank_{kind}" for kind in LAYERS),
                     *(f"distance_{kind}" for kind in LAYERS)])  # fmt: skip

    model, guide, data, batches = load(options.run)
    weights, relaxed = guide.loc.detach(), guide.rank_logits.detach().clone()
    tail = Tail(model, weights, guide.decision().rank_gate, data)
    prior = model.rank_prior_logits[tail.index].double()
    start = relaxed[tail.index].double()
    guides = {"relaxed": [start]}
    for passes in (1, 2, 3, 5, 10):
        iterations = math.ceil(passes * len(batches) / DRAWS)
        guides[f"from relaxed, {passes} passes"] = [
            refined(tail, start, prior, iterations, 32, seed) for seed in range(SEEDS)
        ]
    guides["from relaxed, 300 iterations of all data"] = [
        refined(tail, start, prior, 300, len(tail.labels))
    ]
    print_rows("at the decision of the run", exact(tail, prior), guides)

    begin = time.monotonic()
    refine_guide(model, guide, batches, PASSES)
    seconds = time.monotonic() - begin
    after = guide.rank_logits.detach()
    drawn = draw_posterior(guide, OTHERS, torch.Generator().manual_seed(0)).rank_gate
    sums = [exact(Tail(model, weights, nested(gates), data), prior) for gates in drawn]
    guides = {"relaxed": [start], "refined": [after[tail.index].double()]}
    print_rows("drawn from the refined guide", torch.stack(sums).mean(0), guides)

    pair = [rank_probabilities(x.double().sigmoid()) for x in (relaxed, after)]
    moved = distance(*pair)
    ranks = torch.arange(relaxed.shape[-1] + 1.0, dtype=torch.double)
    means = [float((p @ ranks).mean()) for p in pair]
    print(f"# all {len(moved)} layers: mean rank {means[0]:.2f} relaxed, {means[1]:.2f} refined; "
          f"moved by {moved.mean():.3f} on the average, {moved.max():.3f} at most")  # fmt: skip
    share = [float(relative_bops(model.network, x.sigmoid().float())) for x in (relaxed, after)]
    print(f"# expected bit operations {share[0]:.4f} relaxed, {share[1]:.4f} refined")
    trained = json.loads((options.run / "metrics.json").read_text())["seconds"]
    print(f"# the refinement took {seconds:.0f} s, the run {trained:.0f} s")


if __name__ == "__main__":
    main()
