"""One run of `finetune`: from configuration to results.

    config -> data -> network with adapters -> model and guide -> SVI -> decision -> metrics

It goes on after its last checkpoint if it is told to resume. Several processes go through it side
by side (`processes`).
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from dataclasses import replace
from math import ceil
from pathlib import Path

import pyro
from torch import Tensor

from bayes_lora.errors import InputError
from bayes_lora.inference import processes
from bayes_lora.inference.assemble import assemble, resolve
from bayes_lora.inference.batches import fixed_batches
from bayes_lora.inference.budget import meet_budget
from bayes_lora.inference.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Keeper,
    identity,
    last_checkpoint,
)
from bayes_lora.inference.config import FinetuneConfig
from bayes_lora.inference.files import check_free, open_folder, write_tensors, write_text
from bayes_lora.inference.history import History
from bayes_lora.inference.metrics import evaluate_predictions
from bayes_lora.inference.optimisation import Optimisation, gate_learning_rate
from bayes_lora.inference.peft_adapter import start_from_peft
from bayes_lora.inference.phases import Phase, plan
from bayes_lora.inference.predict import predict
from bayes_lora.inference.prepared import Prepared, prepare
from bayes_lora.inference.refine import DRAWS, refine_guide
from bayes_lora.inference.results import finished, write_results
from bayes_lora.inference.signals import at_once, held_back
from bayes_lora.inference.state import Training, numbers, tensors, trained_state, under
from bayes_lora.inference.train import fit
from bayes_lora.inference.trained import write_task
from bayes_lora.models.guides import GateGuide
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


def train_run(config: FinetuneConfig, priors: Priors) -> dict[str, float]:
    """Fine-tune once; parameters, results and errors are those of `finetune.finetune`."""
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
        folder / CHECKPOINTS,
        identity(resolved, priors, data.train, model),
        settings.save_steps, settings.save_minutes, settings.save_total_limit,
    )  # fmt: skip
    checkpoint = last_checkpoint(keeper.folder, keeper.run) if settings.resume else None
    if checkpoint is None and settings.resume:
        # what has left no checkpoint may go, but not what is finished
        check_free(folder, ("metrics.json",), overwrite=False)
    processes.wait()  # all have looked at the folder: now it may change
    if checkpoint is None:
        open_folder(folder, (*OUTPUTS, CHECKPOINTS))
        header = [
            f"priors: {model.priors}",
            f"classes: {', '.join(data.task.label_names) or 'none'}",
            f"processes: {processes.state().num_processes}",
        ]
        write_text(folder / "config.yaml", resolved.to_yaml(header))
        write_task(folder / "task.json", data.task, len(data.train))
    else:
        begun -= checkpoint.numbers["seconds"]
    gates, history, unsettled = _train(
        config, data, model, guide, phases, optimisation, keeper, checkpoint, begun
    )
    with at_once(_go_on(folder), signal.SIGTERM, signal.SIGINT), processes.drawing_alike():
        metrics = write_results(
            folder, config, data, model, guide, gates, history, unsettled, begun
        )
    keeper.clear()
    return metrics


def _go_on(folder: Path) -> str:
    """How to, after a signal."""
    return f"the same command with --resume goes on after the last checkpoint in {folder}"


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
    accelerator = processes.accelerator(settings.mixed_precision)
    processes.draw_apart(settings.seed)
    refine_epochs = config.posterior.refine_epochs
    steps = sum(phase.steps for phase in phases)
    if refine_epochs:  # sorting a large training set takes seconds
        parts = fixed_batches(data.train, data.collate, settings.batch_size, settings.seed)
        steps += ceil(refine_epochs * len(parts) / DRAWS)
    unsettled: dict[str, float] = {} if checkpoint is None else checkpoint.numbers["unsettled"]
    stopped = _go_on(folder)

    def decide(training: Training) -> Gates:
        if not model.gated:
            return guide.decision()
        if refine_epochs:
            # the generators as they are outside, to come back to
            outside = {n: t for n, t in tensors(training).items() if n.startswith("random.")}

            def refined(state: dict[str, Tensor]) -> None:
                inside = {f"refinement.{name}": tensor for name, tensor in state.items()}
                keep(training, False, outside | inside)

            after = under("refinement.", checkpoint.tensors) if checkpoint else {}
            with accelerator.autocast(), processes.drawing_alike():
                refine_guide(
                    model, guide, parts, refine_epochs, DRAWS, history.refined, after or None,
                    refined,
                )  # fmt: skip
        meet_budget(model, guide)
        processes.copy_from_main(guide.parameters())  # where arithmetic differs between devices
        gates = guide.decision()
        prediction = predict(model, guide, data.validation_batches, gates)
        found = evaluate_predictions(data.task, prediction, data.labels)
        unsettled["score_before_settling"] = found["score"]
        return gates

    def keep(
        training: Training, phase_ended: bool, refinement: dict[str, Tensor] | None = None
    ) -> None:
        refined = int(refinement["refinement.done"]) if refinement else 0
        due = processes.is_main() and keeper.due(training.step + refined)
        signalled, late = processes.most(float(pending.signal or 0), float(due))
        if signalled:  # else one may have come meanwhile, to this process: it waits a step
            pending.signal = int(signalled)
        if phase_ended or signalled or late:
            seconds, kept = time.monotonic() - begun, history.kept()
            mine = {"unsettled": unsettled, "seconds": seconds, "refined": refined}
            keeper.keep(
                Checkpoint(
                    tensors(training) | kept.tensors | (refinement or {}),
                    numbers(training) | kept.numbers | mine,
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
                checkpoint, keep, settings.gradient_accumulation_steps,
            )  # fmt: skip
        finally:  # also after a numerical failure: the last good parameters
            write_tensors(folder / "guide.safetensors", dict(guide.state_dict()))
            write_tensors(folder / "head.safetensors", trained_state(model))
    return gates, history, unsettled
