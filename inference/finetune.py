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
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyro
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from bayes_lora.costs import relative_bops, tensor_bits
from bayes_lora.inference.assemble import assemble
from bayes_lora.inference.backbone import load_backbone
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
from bayes_lora.inference.tasks import Task
from bayes_lora.inference.train import Optimisation, Record, fit, gate_learning_rate
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
    draw = torch.Generator().manual_seed(settings.seed)
    train_loader = DataLoader(
        train,
        batch_size=settings.batch_size,
        sampler=(
            LengthGroupedSampler(settings.batch_size, train, generator=draw)
            if settings.train_sampling_strategy == "group_by_length"
            else RandomSampler(train, generator=draw)
        ),
        drop_last=len(train) >= settings.batch_size,  # so that examples weigh the same
        collate_fn=collate,
    )
    validation_loader = DataLoader(validation, batch_size=64, collate_fn=collate)
    labels = torch.tensor(validation["labels"]).numpy()

    targets = torch.tensor(train["labels"])
    likelihood = Regression.of(targets) if task.is_regression else Classification()
    model, guide = assemble(config, backbone, likelihood, len(train))
    phases = plan(
        max(1, round(settings.epochs * len(train_loader))),
        (settings.warmup_share, settings.anneal_share, settings.joint_share),
        gated=model.gated,
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
    resolved = resolve(config, task, optimisation, model.priors)
    header = [f"priors: {model.priors}", f"classes: {', '.join(task.label_names) or 'none'}"]
    write_text(folder / "config.yaml", resolved.to_yaml(header))
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
            if model.gated:  # otherwise nothing is trained yet
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
        "seconds": time.monotonic() - started,
    }
    if model.gated:
        metrics |= {"price": last["price"], "expected_bops": last["expected_bops"]}
        probabilities = guide.open_probabilities()
        table = rank_and_bits_table(model.network, probabilities, gates)
        write_text(folder / "table.txt", table)
        picture = plot_rank_and_bits(model.network, probabilities)
        write_figure(folder / "rank_and_bits.png", picture)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def resolve(
    config: FinetuneConfig, task: Task, optimisation: Optimisation, priors: Priors
) -> FinetuneConfig:
    """The configuration with what was left to defaults filled in, as far as options can say it."""
    posterior = replace(config.posterior, weight_prior_scale=priors.adapter_weight_scale)
    if type(priors.gates) is GibbsGates and priors.gates.budget is None:
        posterior.price = priors.gates.price
    training = replace(config.training, gate_learning_rate=optimisation.gate_learning_rate)
    data = replace(config.data, task=task.name)
    return replace(config, data=data, posterior=posterior, training=training)


def trained_state(model: BayesianLoRA) -> dict[str, Tensor]:
    """What training changed outside the guide: head, likelihood, ranges of the quantizers."""
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return state | {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("_limits") or name.startswith("likelihood.")
    }


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
    if (folder / "table.txt").exists():
        print((folder / "table.txt").read_text(encoding="utf-8"))
    for name, value in metrics.items():
        print(f"{name:24} {value:.6g}")
    print(f"Results are in {folder}")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
