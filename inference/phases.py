"""The phases of training, and what each does to gates, quantizers and the KL weight.

    phase    gates                        quantization   KL weight
    warmup   open                         off            0
    anneal   sampled                      on             0 -> 1
    joint    sampled                      on             1
    settle   at the posterior decision    on             1 (adapter weights only)

Without the warm-up every rank collapses before the adapters have learned what they are for.
Between joint and settle the posterior of relaxed gates may be refined to that of discrete ones,
the weights held (`refine.py`); this takes no optimizer steps. Without the settling the weights are
never trained at the gates they are deployed with. A method without gates, `lora`, goes through
the same phases with everything open and unquantized: the prior of its weights is annealed alike.
(With its full weight from the first step it held plain LoRA back for half of a run on MRPC: Adam
makes much of a small gradient.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

GateMode = Literal["open", "sampled", "decided"]


@dataclass(frozen=True)
class Phase:
    """A stretch of training steps.

    Attributes
    ----------
    name : str
        `warmup`, `anneal`, `joint` or `settle`.
    gates : {"open", "sampled", "decided"}
        What the gates do.
    steps : int
        Length in optimizer steps.
    """

    name: str
    gates: GateMode
    steps: int

    def kl_weight(self, step: int) -> float:
        """KL weight at `step`, counted from 0 within the phase; in [0, 1]."""
        if self.name == "warmup":
            return 0.0
        return (step + 1) / self.steps if self.name == "anneal" else 1.0


def plan(total_steps: int, shares: tuple[float, float, float], gated: bool) -> list[Phase]:
    """Divide the training steps among the phases.

    Parameters
    ----------
    total_steps : int
        Optimizer steps of the whole run.
    shares : tuple of three floats
        Shares of warm-up, anneal and joint; settle takes the rest.
    gated : bool
        Whether there are gates at all.

    Returns
    -------
    list of Phase
        In order, without empty ones; the steps add up to `total_steps`.

    Examples
    --------
    >>> [(phase.name, phase.steps) for phase in plan(100, (0.2, 0.2, 0.2), gated=True)]
    [('warmup', 20), ('anneal', 20), ('joint', 20), ('settle', 40)]
    """
    learned: GateMode = "sampled" if gated else "open"
    ends = [round(share * total_steps) for share in accumulate(shares)]
    warmup_end, anneal_end, joint_end = (min(end, total_steps) for end in ends)
    phases = [
        Phase("warmup", "open", warmup_end),
        Phase("anneal", learned, anneal_end - warmup_end),
        Phase("joint", learned, joint_end - anneal_end),
        Phase("settle", "decided", total_steps - joint_end),
    ]
    return [phase for phase in phases if phase.steps > 0]
