"""The optimizer: separate learning rates for weights, gates and standard deviations.

Adam moves a parameter by about its learning rate a step, whatever the gradient's size. A gate's
logit has many nats to go, a weight hundredths: so their rates differ, and that of the gates is
tied to the number of steps they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from bayes_lora.inference.phases import Phase
from bayes_lora.models.guides import GateGuide

TRAVEL = 30.0
"""Nats of logit that a gate can travel while gates are sampled: enough to go from open to closed
and back. Over the number of those steps, this is the gates' learning rate."""

SCALE_LEARNING_RATE = 0.01
"""Of the log standard deviations of normal adapter weights, which have nats to go where their means
have hundredths; decays with the weights' rate."""


@dataclass(frozen=True)
class Optimisation:
    """Settings of the optimizer.

    Attributes
    ----------
    learning_rate : float
        Of adapter weights, head and likelihood; warmed up over 6 % of the steps, then decayed
        linearly to zero.
    gate_learning_rate : float
        Of the gate logits; constant.
    max_grad_norm : float
        Clipping threshold of the gradient of -ELBO / N.
    """

    learning_rate: float = 1e-3
    gate_learning_rate: float = 0.05
    max_grad_norm: float = 1.0


def gate_learning_rate(phases: list[Phase]) -> float:
    """Learning rate of the gates that lets a logit travel `TRAVEL` nats while sampled.

    Examples
    --------
    >>> gate_learning_rate([Phase("joint", "sampled", 600)])
    0.05
    """
    sampled = sum(phase.steps for phase in phases if phase.gates == "sampled")
    return min(TRAVEL / max(sampled, 1), 0.2)


def parameter_groups(
    module: torch.nn.Module, guide: GateGuide, lr: float, gate_lr: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights, head and likelihood; gates; standard deviations.

    Parameters
    ----------
    module : Module
        Holds all that is trained, as an ELBO of model and guide does.
    guide : GateGuide
        Its logits and log standard deviations need rates of their own: Adam moves them by about
        the rate a step, and from open to closed are many nats.
    lr, gate_lr : float
        Learning rates.
    """
    gates = [p for p in (guide.rank_logits, guide.bit_logits) if p is not None]
    scales = [] if guide.log_scale is None else [guide.log_scale]
    apart = {id(p) for p in gates + scales}
    weights = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    return [
        {"params": weights, "lr": lr},
        {"params": gates, "lr": gate_lr},
        {"params": scales, "lr": SCALE_LEARNING_RATE},
    ]


def make_optimizer(
    module: torch.nn.Module, guide: GateGuide, optimisation: Optimisation, total_steps: int
) -> tuple[AdamW, LambdaLR]:
    """Optimizer and schedule for a module that holds all that is trained."""
    groups = parameter_groups(
        module, guide, optimisation.learning_rate, optimisation.gate_learning_rate
    )
    decay = warmed_up_then_linear(total_steps)
    optimizer = AdamW(groups, weight_decay=0.0)  # the prior is the weight decay
    return optimizer, LambdaLR(optimizer, [decay, lambda step: 1.0, decay])


def warmed_up_then_linear(total_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: up over 6 % of the steps, then down to zero.

    Examples
    --------
    >>> factor = warmed_up_then_linear(100)
    >>> factor(0), factor(6), factor(53)
    (0.16666666666666666, 1.0, 0.5)
    """
    warmup = max(1, round(0.06 * total_steps))
    return lambda step: min(
        (step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup)
    )
