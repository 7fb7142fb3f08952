"""The SVI loop: one ELBO over adapter weights and gates, through the phases.

The objective is -ELBO / N, in nats per example, so that learning rates and clipping mean the
same for every data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice, pairwise

import pyro
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bayes_lora.costs import relative_bops
from bayes_lora.errors import InputError, NumericalError
from bayes_lora.inference import processes
from bayes_lora.inference.batches import EndlessBatches, calibration_batches
from bayes_lora.inference.checkpoint import Checkpoint
from bayes_lora.inference.elbo import TermwiseELBO
from bayes_lora.inference.optimisation import Optimisation, make_optimizer
from bayes_lora.inference.phases import Phase
from bayes_lora.inference.state import Training, restore
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import GibbsGates

CALIBRATION_BATCHES = 8

PRICE_TRAVEL = 8.0
"""How far the log of the price of a budget can travel in the joint phase: 3000 times up or down."""

Record = dict[str, float | str]


def fit(
    model: BayesianLoRA,
    guide: GateGuide,
    loader: DataLoader,
    phases: list[Phase],
    optimisation: Optimisation,
    accelerator: Accelerator,
    on_step: Callable[[Record], None] = lambda record: None,
    decide: Callable[[Training], Gates] | None = None,
    after: Checkpoint | None = None,
    keep: Callable[[Training, bool], None] = lambda training, phase_ended: None,
    accumulation: int = 1,
) -> Gates:
    """Train model and guide through the phases.

    Parameters
    ----------
    model, guide : BayesianLoRA, GateGuide
        Changed in place.
    loader : DataLoader
        Batches of the training set, with `labels`; gone through as often as needed.
    phases : list of Phase
        As from `plan`.
    optimisation : Optimisation
        Learning rates and clipping.
    accelerator : Accelerator
        Places and prepares everything.
    on_step : function
        Called with one record a step: step, phase, kl_weight, every ELBO term in nats per
        example, price, share of bit operations in expectation and of the decision, mean open
        probabilities.
    decide : function, optional
        Called once, with the training, when the gates have been sampled, for the gates to settle
        at; default: the guide's decision.
    after : Checkpoint, optional
        Go on after it.
    keep : function
        Called after every step, with the training and whether a phase has ended: the place to
        write a checkpoint, or to stop.
    accumulation : int
        Batches of every process whose gradients are averaged for one step, each with its own draw
        of the latents.

    Returns
    -------
    Gates
        The gates the network was settled at.

    Raises
    ------
    NumericalError
        If the loss or its gradient is not finite; the parameters are the last ones whose loss
        was finite.
    InputError
        If the checkpoint is of another model.
    """
    decide = decide or (lambda training: guide.decision())
    elbo = TermwiseELBO()
    module = elbo(model, guide)
    total_steps = sum(phase.steps for phase in phases)
    optimizer, scheduler = make_optimizer(module, guide, optimisation, total_steps)
    processes.leave_shards(module)
    loader_of_all, order = loader, getattr(loader.sampler, "generator", None)
    module, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    batches = EndlessBatches(loader, order)
    training = Training(model, guide, optimizer, scheduler, batches, accelerator)
    if after is not None:
        try:
            restore(training, *after)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"the checkpoint is of another model: {error}") from error
    model.train()  # from_pretrained leaves a backbone without dropout
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    good = [p.detach().clone() for p in parameters]
    # phases whose last parameters are decided upon, or are the result
    relied_on = [p for p, following in pairwise(phases) if following.gates == "decided"]
    relied_on += phases[-1:]

    @torch.no_grad()
    def check(record: Record) -> None:
        """The parameters of a last step must have a finite loss, as those of any other."""
        batch = dict(next(batches))
        loss = module(batch, batch.pop("labels"), 1.0, training.held)
        if not torch.isfinite(processes.mean(loss)):
            _copy(good, parameters)
            raise _not_finite(record | {"loss": math.nan})

    with tqdm(
        total=total_steps,
        initial=training.step,
        unit="step",
        disable=None if processes.is_main() else True,
    ) as progress:
        for phase, step in _from(training.step, phases):
            if step == 0:
                if phase.gates != "open" and model.bit_gates:
                    some = calibration_batches(loader_of_all)
                    calibrate(model, guide, islice(some, CALIBRATION_BATCHES))
                if phase.gates == "sampled":
                    training.held = None
                elif phase.gates == "decided":
                    training.held = decide(training)
            kl_weight = phase.kl_weight(step)
            optimizer.zero_grad()
            found = []
            for further in reversed(range(accumulation)):
                batch = dict(next(batches))
                with (
                    accelerator.no_sync(module) if further else nullcontext(),
                    # looked at once a phase: each look has the host wait for the device
                    pyro.validation_enabled(False) if step else nullcontext(),
                ):
                    loss = module(batch, batch.pop("labels"), kl_weight, training.held)
                    accelerator.backward(loss / model.num_examples / accumulation)
                found.append({"loss": loss.detach()} | elbo.terms)
            accelerator.unscale_gradients(optimizer)
            # apart: a price must not slow the weights
            graded = {
                f"norm {i}": [p for p in group["params"] if p.grad is not None]
                for i, group in enumerate(optimizer.param_groups)
            }
            norms = {
                name: get_total_norm([p.grad for p in ps]) for name, ps in graded.items() if ps
            }
            terms, gates = averaged(found), gate_state(model, guide)
            numbers = on_host(terms | gates | norms)
            nats, state = ({name: numbers[name] for name in part} for part in (terms, gates))
            record = record_step(training.step, phase.name, kl_weight, nats, state, model)
            if not math.isfinite(numbers["loss"]):
                _copy(good, parameters)
                raise _not_finite(record)
            _copy(parameters, good)
            # a scaler skips steps that overflow
            if accelerator.scaler is None and not all(math.isfinite(numbers[n]) for n in norms):
                raise _not_finite(record, module)
            for name, norm in norms.items():
                clip_grads_with_norm_(graded[name], optimisation.max_grad_norm, norm)
            optimizer.step()
            scheduler.step()
            # not before: while the KL weight rises, the price has only part of its effect
            if phase.name == "joint" and isinstance(model.priors.gates, GibbsGates):
                rate = min(PRICE_TRAVEL / phase.steps, 1.0)
                model.priors.gates.ascend(float(record["decided_bops"]), rate)
            training.step += 1
            on_step(record)
            progress.set_postfix_str(_summary(record), refresh=False)
            progress.update()
            ended = step + 1 == phase.steps
            if ended and phase in relied_on:
                check(record)
            keep(training, ended)
    if training.held is None:  # nothing settled
        training.held = decide(training)
    return training.held


def _from(done: int, phases: list[Phase]) -> Iterator[tuple[Phase, int]]:
    """Every phase and step in it, without the first steps of all."""
    steps = ((phase, step) for phase in phases for step in range(phase.steps))
    return islice(steps, done, None)


@torch.no_grad()
def _copy(values: list[Tensor], to: list[Tensor]) -> None:
    for value, target in zip(values, to, strict=True):
        target.copy_(value)


def averaged(terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of every term over the batches of a step, and over the processes.

    Examples
    --------
    >>> averaged([{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(4.0)}])
    {'loss': tensor(2.5000)}
    """
    every = torch.stack([torch.stack([t.float() for t in each.values()]) for each in terms])
    return dict(zip(terms[0], processes.mean(every.mean(0)).unbind(), strict=True))


def on_host(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers of one device by name, fetched all at once: the host waits for it."""
    values = torch.stack([number.float() for number in numbers.values()])
    return dict(zip(numbers, values.tolist(), strict=True))


@torch.no_grad()
def calibrate(model: BayesianLoRA, guide: GateGuide, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set the ranges of all quantizers from a few batches, without dropout."""
    was_training = model.training
    model.eval()
    device = guide.loc.device
    inputs = ({k: v.to(device) for k, v in b.items() if k != "labels"} for b in batches)
    model.network.calibrate(inputs, guide.loc)
    processes.copy_from_main(model.network.buffers())
    model.train(was_training)


def record_step(
    step: int,
    phase: str,
    kl_weight: float,
    nats: Mapping[str, float],
    gates: Mapping[str, float],
    model: BayesianLoRA,
) -> Record:
    """One line of the history: loss and terms of the ELBO, in nats, become nats per example."""
    record: Record = {"step": step, "phase": phase, "kl_weight": kl_weight}
    record |= {name: term / model.num_examples for name, term in nats.items()}
    return record | {"price": getattr(model.priors.gates, "price", 0.0)} | dict(gates)


@torch.no_grad()
def gate_state(model: BayesianLoRA, guide: GateGuide) -> dict[str, Tensor]:
    """Share of bit operations, in expectation and of the decision, and mean open probabilities."""
    probabilities = guide.open_probabilities()
    one = torch.ones((), device=guide.loc.device)
    rank, bits = (one if p is None else p.mean() for p in probabilities)
    return {
        "expected_bops": relative_bops(model.network, *probabilities).to(one.device),
        "decided_bops": relative_bops(model.network, *guide.decision()).to(one.device),
        "mean_open_rank": rank,
        "mean_open_bits": bits,
    }


def _not_finite(record: Record, module: Module | None = None) -> NumericalError:
    """Name the terms of the loss; if a module is given, the parameters by their gradients."""
    if module is None:
        wrong = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    else:
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        wrong = [f"gradient of {n}" for n, g in gradients.items() if not torch.isfinite(g).all()]
        wrong = wrong or ["norm of the gradient"]
    return NumericalError(
        f"step {record['step']}, phase {record['phase']}: {', '.join(wrong)} not finite; "
        "the last parameters with a finite loss were kept. Try a lower --learning_rate"
    )


def _summary(record: Record) -> str:
    kl = {"weights": "kl_adapter_weights", "rank": "kl_rank_gate", "bits": "kl_bit_gate"}
    terms = [f"{short} {float(record[k]):.3g}" for short, k in kl.items() if k in record]
    return (
        f"{record['phase']}: log lik {float(record['log_likelihood']):.3f}, "
        f"KL {', '.join(terms)} nats/example, BOPs {float(record['expected_bops']):.1%}"
    )
