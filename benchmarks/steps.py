"""One training step of every variant, for those who time it: PEFT's, ours, and the residual form.

All train the same targets of MiniLM at the same rank on the same random tokens, with dropout, and
every step has its forward and backward pass, clipping, and the optimizer. The phases:

    open        no gate takes part
    decided     gates are held at 0 and 1, ranks and bits drawn at random
    undecided   every gate is at 1/2: all levels count, all get gradients
    joint       gates are drawn as in the joint phase of the demo, which is trained before: the mean
                over some of its steps

`residual` is the quantizer as a recursion of residuals, x2 + z4 (e4 + z8 (e8 + z16 e16)), in plain
torch, with one range for all levels. A, e and B that have one shape it takes at once, as ours does.

Source: van Baalen et al., "Bayesian Bits", arXiv 2005.07093 (the recursion).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import fmean, median
from typing import NamedTuple
from unittest import mock

import pyro
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from bayes_lora import factors, layers
from bayes_lora.inference.assemble import assemble
from bayes_lora.inference.backbone import Backbone, load_backbone
from bayes_lora.inference.baselines import Setting, build
from bayes_lora.inference.config import parse
from bayes_lora.inference.elbo import TermwiseELBO
from bayes_lora.inference.optimisation import Optimisation, gate_learning_rate, parameter_groups
from bayes_lora.inference.phases import plan
from bayes_lora.inference.prepared import prepare
from bayes_lora.inference.train import Record, fit
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork
from bayes_lora.quantization import Mixture

BATCH, ALPHA = 32, 16.0
BELOW_ONE = 1 - 1e-6  # so that the end of the range is rounded to a point of the grid
JOINT_STEPS = 4  # of a real run, evenly spaced
Step = Callable[[], None]


class Size(NamedTuple):
    """What a step is made of: tokens of an example, rank of the adapters, blocks of MiniLM."""

    tokens: int = 64
    rank: int = 8
    blocks: int = 6


def inputs(tokens: int) -> dict[str, Tensor]:
    """One batch of random tokens, and labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (BATCH, tokens), generator=draw)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(2, (BATCH,), generator=draw),
    }


def cut(blocks: int) -> Backbone:
    """MiniLM's first blocks."""
    backbone = load_backbone(None, 2)
    backbone.model.bert.encoder.layer = backbone.model.bert.encoder.layer[:blocks]
    return backbone


def peft_step(method: str, size: Size, dtype: torch.dtype) -> Step:
    """A step of a baseline."""
    batch, backbone = inputs(size.tokens), cut(size.blocks)
    labels = batch.pop("labels")
    steps = 10_000  # of a training that is in its middle
    baseline = build(
        method, Setting(backbone, size.rank, ALPHA, "all-linear", steps, lambda: (), ())
    )
    network = baseline.network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    count = itertools.count(steps // 4)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(**batch).logits.float()
        loss = cross_entropy(logits, labels) + baseline.penalty()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        baseline.after_step(next(count))

    return step


def our_step(
    variant: str, phase: str, size: Size, dtype: torch.dtype, at: Gates | None = None
) -> Step:
    """A step of ours; in the joint phase at these probabilities of open gates."""
    batch, backbone = inputs(size.tokens), cut(size.blocks)
    labels = batch.pop("labels")
    tensors = layers.TENSORS[:4] if variant == "qr_weights" else layers.TENSORS
    network = AdaptedNetwork(backbone.model, rank=size.rank, alpha=ALPHA, quantized_tensors=tensors)
    kinds = {"lora": "", "r": "r"}.get(variant, "qr")
    model = BayesianLoRA(
        network, Classification(), Priors(), 2000, rank_gates="r" in kinds, bit_gates="q" in kinds
    )
    guide = GateGuide(model, network.initial_adapter_weights())
    network.eval()
    network.calibrate([batch], guide.loc)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        guide.loc.add_(0.01 * torch.randn(guide.loc.shape, generator=draw))
        for logits, probability in zip(
            (guide.rank_logits, guide.bit_logits), at or Gates(), strict=True
        ):
            if logits is not None and probability is not None:
                logits.copy_(probability.logit(1e-6))
    fixed: Gates | None = None
    if phase == "open":
        fixed = Gates()
    elif phase != "joint":
        shapes = Gates(torch.zeros(network.rank_gate_shape), torch.zeros(network.bit_gate_shape))
        fixed = shapes.map(
            lambda zero: (
                torch.bernoulli(zero + 0.5, generator=draw)
                if phase == "decided"
                else (zero + 0.5).requires_grad_()
            )
        )
    model.train()
    module = TermwiseELBO()(model, guide)
    groups = parameter_groups(module, guide, 1e-4, 1e-9)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def step() -> None:
        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            pyro.validation_enabled(False),  # as `fit` has it, but in the first step of a phase
        ):
            loss = module(batch, labels, 1.0, fixed) / model.num_examples
        optimizer.zero_grad()
        loss.backward()
        for group in groups:
            clip_grad_norm_(group["params"], 1.0)
        optimizer.step()

    if variant == "residual":
        return with_residuals(step)
    return step


def with_residuals(step: Step) -> Step:
    """The same step with the recursion in place of the mixture, and all gradients exact."""

    def changed() -> None:
        with (
            mock.patch.multiple(layers, quantize_mixture=residual, linear_of_mixture=linear),
            mock.patch.object(factors, "quantize_mixture", residual),
        ):
            step()

    return changed


def residual(
    x: Tensor,
    limits: Tensor,
    mixture: Mixture,
    _estimated: bool = False,
    numbers: tuple[float, ...] | None = None,
) -> Tensor:
    """Quantize as the recursion says; a gate's product is the weight of all finer levels."""
    limit = limits[-1]
    rest = torch.clamp(x.detach(), -limit * BELOW_ONE, limit * BELOW_ONE)
    total = torch.zeros_like(x)
    for level in range(len(mixture.weights)):
        step = 2 * limit / (2 ** (2 ** (level + 1)) - 1)
        found = step * torch.round(rest / step)
        rest = rest - found
        if not level:
            found = found + (x - x.detach()) * (x.abs() <= limit)
        total = total + mixture.weights[level:].sum(0) * found
    return total


def joint_gates() -> list[Gates]:
    """Open probabilities of all gates at steps of the joint phase of the demo, evenly spaced."""
    words = "--task agreement --epochs 4 --warmup_share 0.5 --joint_share 0.15 --output_dir none"
    config = parse(words.split())
    pyro.set_rng_seed(0)
    data = prepare(config)
    model, guide = assemble(config, data.backbone, data.likelihood, Priors(), len(data.train))
    phases = [p for p in plan(data.steps(4), (0.5, 0.2, 0.15), gated=True) if p.name != "settle"]
    optimisation = Optimisation(gate_learning_rate=gate_learning_rate(phases))
    found: list[Gates] = []

    def keep(record: Record) -> None:
        if record["phase"] == "joint":
            found.append(guide.open_probabilities())

    fit(model, guide, data.batches, phases, optimisation, Accelerator(cpu=True), keep)
    places = torch.linspace(0, len(found) - 1, JOINT_STEPS).round().int()
    return [found[place] for place in places.tolist()]


def steps_of(
    variant: str, phase: str, size: Size, dtype: torch.dtype, joint: list[Gates]
) -> list[Step]:
    """The steps that a cell of the table is the mean of."""
    if variant.startswith("peft_"):
        return [peft_step(variant.removeprefix("peft_"), size, dtype)]
    if phase != "joint":
        return [our_step(variant, phase, size, dtype)]
    return [our_step(variant, phase, size, dtype, at) for at in joint]


def times(cells: list[list[Step]], repeats: int) -> list[tuple[float, float]]:
    """Median seconds of every cell's steps, and ratio to the first cell's just before."""

    def seconds(step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    found: list[list[tuple[float, float]]] = [[] for _ in cells]
    for repeat in tqdm(range(repeats + 1), desc="time", disable=None):
        for steps, rounds in zip(cells, found, strict=True):
            before = seconds(cells[0][0])
            passed = fmean(map(seconds, steps))
            if repeat:  # the first is a warm-up
                rounds.append((passed, passed / before))
    return [(median(t for t, _ in rounds), median(r for _, r in rounds)) for rounds in found]
