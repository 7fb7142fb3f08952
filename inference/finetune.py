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
import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import fmean

import pyro
import torch
from accelerate import Accelerator

from bayes_lora.errors import InputError
from bayes_lora.inference.assemble import assemble, configured_priors, resolve
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.batches import fixed_batches
from bayes_lora.inference.budget import meet_budget
from bayes_lora.inference.bundle import combine, read_bundle, write_bundle
from bayes_lora.inference.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Keeper,
    identity,
    last_checkpoint,
)
from bayes_lora.inference.cli import report_errors
from bayes_lora.inference.config import FinetuneConfig, parse
from bayes_lora.inference.draws import draw_prior, quantities
from bayes_lora.inference.files import (
    check_free,
    open_folder,
    write_tensors,
    write_text,
)
from bayes_lora.inference.history import History
from bayes_lora.inference.metrics import evaluate_predictions
from bayes_lora.inference.optimisation import Optimisation, gate_learning_rate
from bayes_lora.inference.options import data_seed
from bayes_lora.inference.peft_adapter import start_from_peft
from bayes_lora.inference.phases import Phase, plan
from bayes_lora.inference.posterior import PRIOR_DRAWS
from bayes_lora.inference.predict import predict
from bayes_lora.inference.prepared import Prepared, prepare
from bayes_lora.inference.quiet import quiet
from bayes_lora.inference.refine import DRAWS, refine_guide
from bayes_lora.inference.results import finished, write_results
from bayes_lora.inference.signals import held_back
from bayes_lora.inference.state import Training, numbers, tensors, trained_state
from bayes_lora.inference.table import prior_table
from bayes_lora.inference.train import fit
from bayes_lora.inference.trained import write_task
from bayes_lora.models.guides import GateGuide
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
    Interrupted
        If SIGTERM or SIGINT came; there is a checkpoint to resume from.
    """
    # parameters live in their modules, not in Pyro's global store: no run leaks into the next
    with pyro.settings.context(module_local_params=True):
        priors = priors or configured_priors(config)
        if config.training.restarts > 1:
            return _restarts(config, priors)
        return _finetune(config, deepcopy(priors))


def _restarts(config: FinetuneConfig, priors: Priors) -> dict[str, float]:
    settings, folder = config.training, Path(config.training.output_dir)
    if not settings.resume:
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
    begun = time.monotonic()
    settings, folder = config.training, Path(config.training.output_dir)
    if not settings.resume:
        check_free(folder, OUTPUTS, settings.overwrite)
    elif metrics := finished(folder):
        print(f"{folder} is finished already", file=sys.stderr)
        return metrics
    pyro.set_rng_seed(settings.seed)
    data = prepare(config)
    model, guide = assemble(config, data.backbone, data.likelihood, priors, len(data.train))
    if adapter := config.network.init_adapter:
        if unknown := start_from_peft(Path(adapter), model, guide):
            lost = f"{adapter} has no {unknown[0]}: it is learned anew, in a warm-up"
            warnings.warn(lost, stacklevel=2)
        else:
            settings = replace(settings, warmup_share=0.0)
            config = replace(config, training=settings)
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
    resolved = resolve(config, data.task.name, optimisation.gate_learning_rate, model.priors)
    keeper = Keeper(
        folder / CHECKPOINTS, identity(resolved, priors, data.train),
        settings.save_steps, settings.save_minutes, settings.save_total_limit,
    )  # fmt: skip
    checkpoint = last_checkpoint(keeper.folder, keeper.run) if settings.resume else None
    if checkpoint is None:
        if settings.resume:  # what has left no checkpoint may go, but not what is finished
            check_free(folder, ("metrics.json",), overwrite=False)
        open_folder(folder, OUTPUTS)
        keeper.clear()  # of a run that is replaced
        header = [
            f"priors: {model.priors}",
            f"classes: {', '.join(data.task.label_names) or 'none'}",
        ]
        write_text(folder / "config.yaml", resolved.to_yaml(header))
        write_task(folder / "task.json", data.task, len(data.train))
    else:
        begun -= checkpoint.numbers["seconds"]
    gates, history, unsettled = _train(
        config, data, model, guide, phases, optimisation, keeper, checkpoint, begun
    )
    metrics = write_results(folder, config, data, model, guide, gates, history, unsettled, begun)
    keeper.clear()
    return metrics


def _train(
    config: FinetuneConfig,
    data: Prepared,
    model: BayesianLoRA,
    guide: GateGuide,
    phases: list[Phase],
    optimisation: Optimisation,
    keeper: Keeper,
    checkpoint: Checkpoint | None,
    begun: float,
) -> tuple[Gates, History, dict[str, float]]:
    """Go through the phases; what is decided, the history, and the score before settling."""
    settings, folder = config.training, Path(config.training.output_dir)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    refine_epochs = config.posterior.refine_epochs
    steps = sum(phase.steps for phase in phases)
    if refine_epochs:  # sorting a large training set takes seconds
        parts = fixed_batches(data.train, data.collate, settings.batch_size, settings.seed)
        steps += ceil(refine_epochs * len(parts) / DRAWS)
    unsettled: dict[str, float] = {} if checkpoint is None else checkpoint.numbers["unsettled"]
    stopped = f"the same command with --resume goes on after the last checkpoint in {folder}"

    def refined(terms: dict[str, float]) -> None:
        history.refined(terms)
        pending.act(stopped)

    def decide() -> Gates:
        if not model.gated:
            return guide.decision()
        if refine_epochs:
            with accelerator.autocast():
                refine_guide(model, guide, parts, refine_epochs, DRAWS, refined)
        meet_budget(model, guide)
        gates = guide.decision()
        prediction = predict(model, guide, data.validation_batches, gates)
        found = evaluate_predictions(data.task, *prediction, data.labels)
        unsettled["score_before_settling"] = found["score"]
        return gates

    def keep(training: Training, phase_ended: bool) -> None:
        signalled = pending.signal is not None  # one that comes later waits for the next step
        if phase_ended or signalled or keeper.due(training.step):
            mine = {"unsettled": unsettled, "seconds": time.monotonic() - begun}
            kept = history.kept()
            keeper.keep(
                Checkpoint(
                    tensors(training) | kept.tensors, numbers(training) | kept.numbers | mine
                )
            )
        if signalled:
            pending.act(stopped)

    with (
        held_back() as pending,
        History(folder / "history.csv", model, guide, steps, checkpoint) as history,
    ):
        try:
            gates = fit(
                model, guide, data.batches, phases, optimisation, accelerator, history.add, decide,
                checkpoint, keep,
            )  # fmt: skip
        finally:  # also after a numerical failure: the last good parameters
            write_tensors(folder / "guide.safetensors", dict(guide.state_dict()))
            write_tensors(folder / "head.safetensors", trained_state(model))
    return gates, history, unsettled


def prior_predictive(config: FinetuneConfig) -> str:
    """What the prior implies for rank, bits and bit operations, as text; nothing is trained."""
    backbone = load_backbone(config.network.backbone, num_labels=2)
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
    if (folder / "table.txt").exists():
        print((folder / "table.txt").read_text(encoding="utf-8"))
    for name, value in metrics.items():
        print(f"{name:24} {value:.6g}")
    print(f"Results are in {folder}")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
