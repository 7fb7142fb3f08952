"""Fine-tune a pretrained transformer: `bayes-lora finetune`, from configuration to results.

    config -> data -> network with adapters -> model and guide -> SVI -> decision -> metrics

What the output folder holds afterwards: config.yaml, history.csv (nats per example, one line a
step), metrics.json, decision.json and table.txt (rank and bits of every layer), rank_and_bits.png,
posterior.nc (draws of the posterior, for ArviZ), task.json (what labels mean), guide.safetensors
(posterior of weights and gates) and head.safetensors (trained head, likelihood, ranges of the
quantizers). With restarts, every one has such a folder inside, and
posterior.nc has them as chains. Until it is finished a run also holds checkpoints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import cast, get_args

import pyro
import torch

from bayes_lora.errors import InputError
from bayes_lora.inference import processes
from bayes_lora.inference.assemble import assemble, configured_priors
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.bundle import read_bundle, write_bundle
from bayes_lora.inference.chains import combine, pooled
from bayes_lora.inference.checkpoint import CHECKPOINTS
from bayes_lora.inference.child import in_a_child
from bayes_lora.inference.cli import report_errors
from bayes_lora.inference.config import FinetuneConfig, parse
from bayes_lora.inference.draws import draw_prior, quantities
from bayes_lora.inference.files import check_free, open_folder, restarts, write_text
from bayes_lora.inference.metrics import evaluate_predictions
from bayes_lora.inference.options import data_seed
from bayes_lora.inference.posterior import PRIOR_DRAWS
from bayes_lora.inference.quiet import quiet
from bayes_lora.inference.table import prior_table
from bayes_lora.inference.tasks import Problem
from bayes_lora.inference.train_run import OUTPUTS, train_run
from bayes_lora.inference.trained import read_task
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.priors import Priors


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
    Interrupted
        If SIGTERM or SIGINT came; there is a checkpoint to resume from.
    """
    # parameters live in their modules, not in Pyro's global store: no run leaks into the next
    with pyro.settings.context(module_local_params=True):
        priors = priors or configured_priors(config)
        if config.training.restarts > 1:
            return _restarts(config, priors)
        return train_run(config, deepcopy(priors))


def _restarts(config: FinetuneConfig, priors: Priors) -> dict[str, float]:
    """Train the chains one after the other; several processes share them."""
    settings, folder = config.training, Path(config.training.output_dir)
    if not (settings.resume and restarts(folder)):
        check_free(folder, OUTPUTS, settings.overwrite)
        processes.wait()  # all have looked at the folder: now it may change
        open_folder(folder, (*OUTPUTS, CHECKPOINTS))
        processes.wait()
    folders = [folder / f"restart-{k}" for k in range(settings.restarts)]
    for k, inner in processes.share(enumerate(folders)):
        training = replace(
            settings, seed=settings.seed + k, data_seed=data_seed(settings),
            output_dir=str(inner), restarts=1,
        )  # fmt: skip
        one = replace(config, training=training)
        if processes.state().num_processes > 1:  # each trains all of its model alone
            in_a_child(inner, _restart, one, priors)
        else:
            train_run(one, deepcopy(priors))
    processes.wait()
    found = [json.loads((inner / "metrics.json").read_text(encoding="utf-8")) for inner in folders]
    chains = [read_bundle(inner / "posterior.nc") for inner in folders]
    bundle = combine(chains)
    write_bundle(folder / "posterior.nc", bundle)
    first = parse(["--config", str(folders[0] / "config.yaml")])
    training = replace(first.training, output_dir=str(folder), restarts=settings.restarts)
    write_text(folder / "config.yaml", replace(first, training=training).to_yaml())
    means = {name: fmean(metrics[name] for metrics in found) for name in found[0]}
    means["seconds"] *= len(found)
    task, _ = read_task(folders[0] / "task.json")
    labels = bundle["predictions_constant_data"]["label"].to_numpy()
    together = evaluate_predictions(task, pooled(bundle).averaged(), labels)
    means |= {f"averaged_{name}": value for name, value in together.items()}
    write_text(folder / "metrics.json", json.dumps(means, indent=2) + "\n")
    return means


def _restart(config: FinetuneConfig, priors: Priors) -> None:
    """Train one chain, in a process of its own."""
    quiet()
    finetune(config, priors)


def prior_predictive(config: FinetuneConfig) -> str:
    """What the prior implies for rank, bits and bit operations, as text; nothing is trained."""
    problem: Problem = "classification"
    if config.data.task in get_args(Problem):
        problem = cast(Problem, config.data.task)
    num_labels = None if problem in ("causal_lm", "seq2seq_lm") else 2
    backbone = load_backbone(config.network.backbone, num_labels, problem)
    priors = configured_priors(config)
    model, _ = assemble(config, backbone, Classification(), priors, num_examples=1)
    if not model.gated:
        raise InputError("prior_predictive needs gates: choose another method than lora")
    gates = draw_prior(model, PRIOR_DRAWS, torch.Generator().manual_seed(config.training.seed))
    return prior_table(model.network, quantities(model.network, gates, PRIOR_DRAWS))


def run(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune as the command line says, and print table and metrics."""
    quiet()
    config = parse(arguments)
    if config.posterior.prior_predictive:
        print(prior_predictive(config))
        return
    metrics = finetune(config)
    folder = Path(config.training.output_dir)
    main = processes.is_main()
    processes.finish()
    if not main:
        return
    if (folder / "table.txt").exists():
        print((folder / "table.txt").read_text(encoding="utf-8"))
    for name, value in metrics.items():
        print(f"{name:24} {value:.6g}")
    print(f"Results are in {folder}")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
