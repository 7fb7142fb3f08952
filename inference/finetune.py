"""Fine-tune a pretrained transformer: `bayes-lora finetune`, from configuration to results.

    config -> data -> network with adapters -> model and guide -> SVI -> decision -> metrics

What the output folder holds afterwards: config.yaml, history.csv (nats per example, one line a
step), metrics.json, table.txt, rank_and_bits.png, guide.safetensors (posterior of weights and
gates) and head.safetensors (trained head, likelihood, ranges of the quantizers).
"""

from __future__ import annotations

import csv
import json
import sys
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyro
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from bayes_lora.costs import relative_bops, tensor_bits
from bayes_lora.gates import independent, nested
from bayes_lora.inference.backbone import Backbone, load_backbone
from bayes_lora.inference.cli import report_errors
from bayes_lora.inference.config import FinetuneConfig, parse
from bayes_lora.inference.data import load_task, tokenize
from bayes_lora.inference.elbo import KL_TERMS
from bayes_lora.inference.files import (
    check_free,
    open_folder,
    write_figure,
    write_tensors,
    write_text,
)
from bayes_lora.inference.metrics import evaluate_predictions
from bayes_lora.inference.phases import plan
from bayes_lora.inference.plots import plot_rank_and_bits
from bayes_lora.inference.predict import predict
from bayes_lora.inference.table import rank_and_bits_table
from bayes_lora.inference.train import Optimisation, Record, fit, gate_learning_rate
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification, Regression
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import GibbsGates, Priors
from bayes_lora.network import AdaptedNetwork

OUTPUTS = (
    "config.yaml",
    "history.csv",
    "metrics.json",
    "table.txt",
    "rank_and_bits.png",
    "guide.safetensors",
    "head.safetensors",
)
HISTORY_COLUMNS = (
    "step", "phase", "kl_weight", "loss", "log_likelihood", *KL_TERMS, "energy",
    "price", "expected_bops", "mean_open_rank", "mean_open_bits",
)  # fmt: skip


def finetune(config: FinetuneConfig) -> dict[str, float]:
    """Fine-tune as configured, write the results to `config.training.output_dir`.

    Parameters
    ----------
    config : FinetuneConfig
        As from `parse`.

    Returns
    -------
    dict of str to float
        What `metrics.json` holds.

    Raises
    ------
    InputError
        If data, backbone or output folder are not what they should be. Nothing is written then.
    NumericalError
        If training leaves the finite numbers; the last good parameters are written.
    """
    # parameters live in their modules, not in Pyro's global store: no run leaks into the next
    with pyro.settings.context(module_local_params=True):
        return _finetune(config)


def _finetune(config: FinetuneConfig) -> dict[str, float]:
    started = time.monotonic()
    settings, folder = config.training, Path(config.training.output_dir)
    check_free(folder, OUTPUTS, settings.overwrite)
    pyro.set_rng_seed(settings.seed)
    task, train, validation = load_task(config.data, settings.seed)
    backbone = load_backbone(config.network.backbone, task.num_labels)
    collate = transformers.DataCollatorWithPadding(backbone.tokenizer)
    train, validation = (
        tokenize(part, task, backbone.tokenizer, config.data.max_length)
        for part in (train, validation)
    )
    train_loader = DataLoader(
        train,
        batch_size=settings.batch_size,
        sampler=LengthGroupedSampler(  # a third less padding than in batches drawn at random
            settings.batch_size,
            lengths=[len(ids) for ids in train["input_ids"]],
            generator=torch.Generator().manual_seed(settings.seed),
        ),
        drop_last=len(train) >= settings.batch_size,  # so that examples weigh the same
        collate_fn=collate,
    )
    validation_loader = DataLoader(validation, batch_size=64, collate_fn=collate)
    labels = torch.tensor(validation["labels"]).numpy()

    model, guide = build(config, backbone, len(train), task.is_regression)
    phases = plan(
        max(1, round(settings.epochs * len(train_loader))),
        (settings.warmup_share, settings.anneal_share, settings.joint_share),
        gated=model.rank_gates or model.bit_gates,
    )
    optimisation = Optimisation(
        settings.learning_rate,
        settings.gate_learning_rate or gate_learning_rate(phases),
        settings.max_grad_norm,
    )
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)

    def evaluate(gates: Gates) -> dict[str, float]:
        return evaluate_predictions(task, *predict(model, guide, validation_loader, gates), labels)

    open_folder(folder, OUTPUTS)
    write_text(folder / "config.yaml", config.to_yaml())
    last: dict[str, Any] = {}
    last_epoch: deque[float] = deque(maxlen=len(train_loader))
    unsettled: dict[str, float] = {}
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        history = csv.DictWriter(file, HISTORY_COLUMNS, restval="")
        history.writeheader()

        def on_step(record: Record) -> None:
            history.writerow(record)
            file.flush()
            last.update(record)
            last_epoch.append(float(record["log_likelihood"]))

        def on_decision(gates: Gates) -> None:
            if model.rank_gates or model.bit_gates:  # otherwise nothing is trained yet
                unsettled["score_before_settling"] = evaluate(gates)["score"]

        try:
            gates = fit(
                model, guide, train_loader, phases, optimisation, accelerator, on_step, on_decision
            )
        finally:  # also after a numerical failure: the last good parameters
            write_tensors(folder / "guide.safetensors", dict(guide.state_dict()))
            write_tensors(folder / "head.safetensors", trained_state(model))

    metrics = {
        **evaluate(gates),
        **unsettled,
        "log_likelihood": sum(last_epoch) / len(last_epoch) * len(train),  # of the training set
        **{name: last[name] * len(train) for name in (*KL_TERMS, "energy") if name in last},
        **size(model.network, gates),
        "price": last["price"],
        "gate_learning_rate": optimisation.gate_learning_rate,
        "seconds": time.monotonic() - started,
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    probabilities = guide.open_probabilities()
    table = rank_and_bits_table(model.network, probabilities, gates)
    write_text(folder / "table.txt", table)
    if model.rank_gates or model.bit_gates:
        picture = plot_rank_and_bits(model.network, probabilities)
        write_figure(folder / "rank_and_bits.png", picture)
    return metrics


def build(
    config: FinetuneConfig, backbone: Backbone, num_examples: int, regression: bool
) -> tuple[BayesianLoRA, GateGuide]:
    """Put model and guide together as configured.

    Parameters
    ----------
    config : FinetuneConfig
        Network, posterior and seed are looked at.
    backbone : Backbone
        The pretrained transformer; its model is adapted in place.
    num_examples : int
        N, the size of the training set.
    regression : bool
        A normal likelihood in place of a categorical one.

    Returns
    -------
    tuple of BayesianLoRA and GateGuide
        Untrained.
    """
    settings, posterior = config.network, config.posterior
    network = AdaptedNetwork(
        backbone.model,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        quantized_tensors=settings.quantized_tensors,
        num_levels=settings.max_bits.bit_length() - 2,
        structure={"nested": nested, "independent": independent}[posterior.rank_structure],
        trained_parameters=backbone.new_parameters,
    )
    priors = Priors()  # as the page says, but for what the command line says
    if posterior.weight_prior_scale is not None:
        priors.adapter_weight_scale = posterior.weight_prior_scale
    if posterior.price is not None:
        priors.gates = GibbsGates(price=posterior.price)
    if posterior.target_bops is not None:
        priors.gates = GibbsGates(budget=posterior.target_bops)
    model = BayesianLoRA(
        network,
        Regression() if regression else Classification(),
        priors,
        num_examples,
        rank_gates=posterior.method in ("r", "qr"),
        bit_gates=posterior.method in ("q", "qr"),
    )
    generator = torch.Generator().manual_seed(config.training.seed)
    initial = network.initial_adapter_weights(generator)
    return model, GateGuide(model, initial, posterior.weight_posterior == "normal")


def trained_state(model: BayesianLoRA) -> dict[str, Tensor]:
    """What training changed outside the guide: head, likelihood, ranges of the quantizers."""
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return state | {name: b for name, b in model.named_buffers() if name.endswith("_limits")}


def size(network: AdaptedNetwork, gates: Gates) -> dict[str, float]:
    """Relative bit operations, mean rank, and mean bits by tensor kind, over the layers."""
    rank = float(network.rank)
    if gates.rank_gate is not None:
        rank = float(network.structure(gates.rank_gate).sum(-1).mean())
    return {
        "relative_bops_32": float(relative_bops(network, *gates)),
        "relative_bops_16": float(relative_bops(network, *gates, reference_bits=16)),
        "mean_rank": rank,
        **{
            f"mean_bits_{tensor}": float(bits.mean())
            for tensor, bits in tensor_bits(network, gates.bit_gate).items()
        },
    }


def run(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune as the command line says, and print table and metrics."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Encountered NaN")  # reported as an error, once
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    config = parse(arguments)
    metrics = finetune(config)
    folder = Path(config.training.output_dir)
    print((folder / "table.txt").read_text(encoding="utf-8"))
    for name, value in metrics.items():
        print(f"{name:24} {value:.6g}")
    print(f"Results are in {folder}")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
