"""Fine-tune a pretrained transformer: `bayes-lora finetune`, from configuration to results.

    config -> data -> network with adapters -> model and guide -> SVI -> decision -> metrics

What the output folder holds afterwards: config.yaml, history.csv (nats per example, one line a
step), metrics.json, decision.json and table.txt (rank and bits of every layer), rank_and_bits.png,
posterior.nc (draws of the posterior, for ArviZ), task.json (what labels mean), guide.safetensors
(posterior of weights and gates) and head.safetensors (trained head, likelihood, ranges of the
quantizers). With restarts, every one has such a folder inside, and
posterior.nc has them as chains.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import fmean

import datasets
import pyro
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

from bayes_lora.costs import totals
from bayes_lora.errors import InputError
from bayes_lora.inference.assemble import assemble, configured_priors, resolve
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.batches import forever, training_batches
from bayes_lora.inference.budget import TOLERANCE, meet_budget
from bayes_lora.inference.bundle import combine, read_bundle, write_bundle
from bayes_lora.inference.cli import report_errors
from bayes_lora.inference.config import FinetuneConfig, data_seed, parse
from bayes_lora.inference.decision import MORE_PROBABLE_SIDE, write_decision
from bayes_lora.inference.draws import draw_prior, quantities
from bayes_lora.inference.files import (
    check_free,
    open_folder,
    write_figure,
    write_tensors,
    write_text,
)
from bayes_lora.inference.history import History
from bayes_lora.inference.metrics import constant_nll, evaluate_predictions
from bayes_lora.inference.optimisation import Optimisation, gate_learning_rate
from bayes_lora.inference.peft_adapter import start_from_peft
from bayes_lora.inference.phases import plan
from bayes_lora.inference.plots import plot_rank_and_bits
from bayes_lora.inference.posterior import PRIOR_DRAWS, sample_posterior
from bayes_lora.inference.predict import averaged, predict
from bayes_lora.inference.prepared import prepare
from bayes_lora.inference.refine import DRAWS, refine_guide
from bayes_lora.inference.table import prior_table, rank_and_bits_table
from bayes_lora.inference.train import fit
from bayes_lora.inference.trained import write_task
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import Priors

DIAGNOSIS = ("diagnosis.json", "report.html")  # of `bayes-lora diagnose`: an old one must go
OUTPUTS = (
    "config.yaml",
    "task.json",
    "history.csv",
    "metrics.json",
    "decision.json",
    "table.txt",
    "rank_and_bits.png",
    "guide.safetensors",
    "head.safetensors",
    "posterior.nc",
    *DIAGNOSIS,
)


def finetune(config: FinetuneConfig, priors: Priors | None = None) -> dict[str, float]:
    """Fine-tune as configured, write the results to `config.training.output_dir`.

    Parameters
    ----------
    config : FinetuneConfig
        As from `parse`.
    priors : Priors, optional
        In place of those that the configuration makes.

    Returns
    -------
    dict of str to float
        What `metrics.json` holds; with restarts, the means over them.

    Raises
    ------
    InputError
        If data, backbone or output folder are not what they should be. Nothing is written then.
    NumericalError
        If training leaves the finite numbers; the last good parameters are written.
    """
    # parameters live in their modules, not in Pyro's global store: no run leaks into the next
    with pyro.settings.context(module_local_params=True):
        priors = priors or configured_priors(config)
        if config.training.restarts > 1:
            return _restarts(config, priors)
        return _finetune(config, deepcopy(priors))


def _restarts(config: FinetuneConfig, priors: Priors) -> dict[str, float]:
    settings, folder = config.training, Path(config.training.output_dir)
    check_free(folder, OUTPUTS, settings.overwrite)
    open_folder(folder, OUTPUTS)
    folders = [folder / f"restart-{k}" for k in range(settings.restarts)]
    found = []
    for k, inner in enumerate(folders):
        training = replace(
            settings, seed=settings.seed + k, data_seed=data_seed(settings),
            output_dir=str(inner), restarts=1,
        )  # fmt: skip
        found.append(_finetune(replace(config, training=training), deepcopy(priors)))
    chains = [read_bundle(inner / "posterior.nc") for inner in folders]
    write_bundle(folder / "posterior.nc", combine(chains))
    first = parse(["--config", str(folders[0] / "config.yaml")])
    training = replace(first.training, output_dir=str(folder), restarts=settings.restarts)
    write_text(folder / "config.yaml", replace(first, training=training).to_yaml())
    means = {name: fmean(metrics[name] for metrics in found) for name in found[0]}
    means["seconds"] *= len(found)
    write_text(folder / "metrics.json", json.dumps(means, indent=2) + "\n")
    return means


def _finetune(config: FinetuneConfig, priors: Priors) -> dict[str, float]:
    started = time.monotonic()
    settings, folder = config.training, Path(config.training.output_dir)
    check_free(folder, OUTPUTS, settings.overwrite)
    pyro.set_rng_seed(settings.seed)
    data = prepare(config)
    task, train, labels = data.task, data.train, data.labels
    model, guide = assemble(config, data.backbone, data.likelihood, priors, len(train))
    if adapter := config.network.init_adapter:
        start_from_peft(Path(adapter), model, guide)
        settings = replace(settings, warmup_share=0.0)
    phases = plan(
        data.steps(settings.epochs),
        (settings.warmup_share, settings.anneal_share, settings.joint_share),
        gated=model.gated,
    )
    budget = getattr(priors.gates, "budget", None)
    if budget is not None and all(phase.name != "joint" for phase in phases):
        raise InputError("target_bops needs joint steps: give more --joint_share or --epochs")
    optimisation = Optimisation(
        settings.learning_rate,
        settings.gate_learning_rate or gate_learning_rate(phases),
        settings.max_grad_norm,
    )
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    open_folder(folder, OUTPUTS)
    resolved = resolve(config, task.name, optimisation.gate_learning_rate, model.priors)
    header = [f"priors: {model.priors}", f"classes: {', '.join(task.label_names) or 'none'}"]
    write_text(folder / "config.yaml", resolved.to_yaml(header))
    write_task(folder / "task.json", task, len(train))
    unsettled: dict[str, float] = {}
    iterations = ceil(config.posterior.refine_epochs * len(data.batches) / DRAWS)

    def decide() -> Gates:
        if not model.gated:
            return guide.decision()
        if iterations:
            # batches of their own, so that all methods are trained on the same ones
            batches = forever(
                training_batches(
                    train, data.collate, settings.batch_size, "random", settings.seed + 1
                )
            )
            with accelerator.autocast():
                refine_guide(model, guide, batches, iterations, DRAWS, on_iteration=history.refined)
        meet_budget(model, guide)
        gates = guide.decision()
        prediction = predict(model, guide, data.validation_batches, gates)
        unsettled["score_before_settling"] = evaluate_predictions(task, *prediction, labels)[
            "score"
        ]
        return gates

    steps = sum(phase.steps for phase in phases) + iterations
    with History(folder / "history.csv", model, guide, steps) as history:
        try:
            gates = fit(
                model, guide, data.batches, phases, optimisation, accelerator, history.add, decide
            )
        finally:  # also after a numerical failure: the last good parameters
            write_tensors(folder / "guide.safetensors", dict(guide.state_dict()))
            write_tensors(folder / "head.safetensors", trained_state(model))

    write_decision(folder / "decision.json", model.network, gates, MORE_PROBABLE_SIDE)
    end = history.last(len(data.batches))
    decided = totals(model.network, *gates)
    share = decided["relative_bops_32"]
    if budget is not None and abs(share / budget - 1) > TOLERANCE:
        warnings.warn(
            f"the decision takes {share:.2%} of all bit operations, not the {budget:.2%} wanted: "
            f"the data ask for {'no more' if share < budget else 'more'} at any price in reach",
            stacklevel=2,
        )
    reached = -end["log_likelihood"] / len(train)
    if reached > constant_nll(data.targets.numpy(), task.is_regression) - 0.01:
        warnings.warn(
            f"nothing was learned: NLL on the training set is {reached:.3f} nats an example, no "
            "better than by the labels' frequencies. Gates close over adapters that have learned "
            "nothing: give more --epochs or --warmup_share, or another --learning_rate",
            stacklevel=2,
        )
    metrics = {
        **evaluate_predictions(
            task, *predict(model, guide, data.validation_batches, gates), labels
        ),
        **unsettled,
        **end,
        **decided,
        "trainable_parameters": sum(
            p.numel() for part in (model, guide) for p in part.parameters() if p.requires_grad
        ),
        "seconds": time.monotonic() - started,
    }
    if model.gated:
        table = rank_and_bits_table(model.network, guide.open_probabilities(), gates)
        write_text(folder / "table.txt", table)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")

    posterior, prediction = sample_posterior(
        model, guide, task, train, data.validation, data.collate, history,
        config.posterior.draws, settings.seed, config.posterior.save_weight_draws,
    )  # fmt: skip
    write_bundle(folder / "posterior.nc", posterior)
    if model.gated:
        write_figure(folder / "rank_and_bits.png", plot_rank_and_bits(posterior))
    over_draws = evaluate_predictions(task, *averaged(prediction), labels)
    metrics |= {f"averaged_{name}": value for name, value in over_draws.items()}
    metrics["seconds"] = time.monotonic() - started
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def trained_state(model: BayesianLoRA) -> dict[str, Tensor]:
    """What a run has outside the guide: head, likelihood, ranges of quantizers, prior logits."""
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return state | {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("_limits", "_prior_logits")) or name.startswith("likelihood.")
    }


def prior_predictive(config: FinetuneConfig) -> str:
    """What the prior implies for rank, bits and bit operations, as text; nothing is trained."""
    backbone = load_backbone(config.network.backbone, num_labels=2)
    priors = configured_priors(config)
    model, _ = assemble(config, backbone, Classification(), priors, num_examples=1)
    if not model.gated:
        raise InputError("prior_predictive needs gates: choose another method than lora")
    gates = draw_prior(model, PRIOR_DRAWS, torch.Generator().manual_seed(config.training.seed))
    return prior_table(model.network, quantities(model.network, gates, PRIOR_DRAWS))


def quiet() -> None:
    """Leave to the libraries' messages only what a user of a command can do something about."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Encountered NaN")  # reported as an error, once
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def run(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune as the command line says, and print table and metrics."""
    quiet()
    config = parse(arguments)
    if config.posterior.prior_predictive:
        print(prior_predictive(config))
        return
    metrics = finetune(config)
    folder = Path(config.training.output_dir)
    if (folder / "table.txt").exists():
        print((folder / "table.txt").read_text(encoding="utf-8"))
    for name, value in metrics.items():
        print(f"{name:24} {value:.6g}")
    print(f"Results are in {folder}")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
