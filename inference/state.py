"""All that a step of training changes, as tensors and numbers that a file can hold.

Trained parameters and the quantizers' ranges, not the frozen backbone; the optimizer's moments and
its place in the schedule; the price, and the gates that the network is held at; the place in the
data; and the state of every random generator. A training that is put back to such a state goes on
as if it had not stopped: bit for bit, on a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bayes_lora.inference import processes
from bayes_lora.inference.batches import EndlessBatches
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates


@dataclass
class Training:
    """A training between two of its steps.

    Attributes
    ----------
    model, guide : BayesianLoRA, GateGuide
        What is trained.
    optimizer, scheduler : Optimizer, LambdaLR
        Of all their parameters.
    batches : EndlessBatches
        Of the training set.
    accelerator : Accelerator
        Has the scale of the loss, if there is one.
    step : int
        How many steps are done.
    held : Gates or None
        What the gates are held at; None while they are sampled.
    """

    model: BayesianLoRA
    guide: GateGuide
    optimizer: Optimizer
    scheduler: LambdaLR
    batches: EndlessBatches
    accelerator: Accelerator
    step: int = 0
    held: Gates | None = field(default_factory=Gates)


def trained_state(model: BayesianLoRA) -> dict[str, Tensor]:
    """What a run has outside the guide: head, likelihood, ranges of quantizers, prior logits."""
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return state | {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("_limits", "_prior_logits")) or name.startswith("likelihood.")
    }


@torch.no_grad()
def fill(module: Module, state: Mapping[str, Tensor]) -> None:
    """Put every tensor in its place.

    Raises
    ------
    ValueError
        If one has no place of its name and shape, or a trained parameter no tensor; it is named.
    """
    known: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    lost = [n for n, p in module.named_parameters() if p.requires_grad and n not in state]
    wrong = [n for n, t in state.items() if n not in known or known[n].shape != t.shape]
    if found := lost + wrong:
        raise ValueError(found[0])
    for name, tensor in state.items():
        known[name].copy_(tensor)


def tensors(training: Training) -> dict[str, Tensor]:
    """The tensors of a state, by name."""
    found = {f"model.{name}": tensor for name, tensor in trained_state(training.model).items()}
    found |= {f"guide.{name}": tensor for name, tensor in training.guide.state_dict().items()}
    for index, moments in training.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": moment for name, moment in moments.items()}
    found |= {
        f"held.{name}": gate
        for name, gate in (training.held or Gates())._asdict().items()
        if gate is not None
    }
    found["random.order"] = training.batches.place[0]
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    for index, generators in enumerate(processes.of_each(mine)):
        found |= {f"random.{index}.{name}": state for name, state in generators.items()}
    return found


def numbers(training: Training) -> dict[str, Any]:
    """The rest of a state, as JSON has it."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one)
    scaler = training.accelerator.scaler
    return {
        "step": training.step,
        "sampled": training.held is None,
        "taken": training.batches.place[1],
        "price": getattr(training.model.priors.gates, "price", None),
        "learning_rates": training.scheduler.get_last_lr(),
        "random": processes.of_each([random.getstate(), [kind, np.asarray(keys).tolist(), *rest]]),
        "scaler": None if scaler is None else scaler.state_dict(),
    }


@torch.no_grad()
def restore(training: Training, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put a training to a state, in place.

    Raises
    ------
    KeyError, RuntimeError, ValueError, TypeError
        If the state is of another training.
    """
    for part in ("model", "guide"):
        module = getattr(training, part)
        state = under(f"{part}.", tensors)
        wanted = trained_state(module) if part == "model" else module.state_dict()
        if set(wanted) != set(state):
            raise KeyError(f"{part} has other parameters")
        fill(module, state)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer.", tensors).items():
        index, kind = name.split(".")
        moments.setdefault(int(index), {})[kind] = tensor
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    rates = list(numbers["learning_rates"])
    for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    training.step = int(numbers["step"])
    schedule = {"last_epoch": training.step, "_step_count": training.step + 1, "_last_lr": rates}
    training.scheduler.load_state_dict(training.scheduler.state_dict() | schedule)
    if numbers["price"] is not None:
        training.model.priors.gates.price = float(numbers["price"])  # type: ignore[attr-defined]
    device = training.guide.loc.device
    held = {name: gate.to(device) for name, gate in under("held.", tensors).items()}
    training.held = None if numbers["sampled"] else Gates(**held)
    if training.accelerator.scaler is not None and numbers["scaler"] is not None:
        training.accelerator.scaler.load_state_dict(numbers["scaler"])
    training.batches.go_to(tensors["random.order"], int(numbers["taken"]))
    # at last, as all before may draw
    index = processes.state().process_index
    generators = under(f"random.{index}.", tensors)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])
    of_python, of_numpy = numbers["random"][index]
    version, internal, gauss = of_python
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = of_numpy
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
