"""Decide ranks and bits anew, without training: `bayes-lora decide RUN [--max_bops 0.03]`.

Without a budget every gate goes to its more probable side. What is decided is written to
RUN/decision.json, where `export` and `predict` look; the rest of the run stays as it was trained.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from bayes_lora.costs import FULL_BITS, bit_operations, totals
from bayes_lora.errors import InputError
from bayes_lora.inference.allocation import Cost, allocate, layer_bops, layer_bytes, least_cost
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.decision import MORE_PROBABLE_SIDE, describe, write_decision
from bayes_lora.inference.metrics import evaluate_predictions
from bayes_lora.inference.predict import predict
from bayes_lora.inference.quiet import quiet
from bayes_lora.inference.table import short_names
from bayes_lora.inference.trained import Trained, Validation, read_run, validation_if_there
from bayes_lora.inference.worth import worth
from bayes_lora.models.model import Gates
from bayes_lora.models.priors import GibbsGates

JUDGED = ("score", "nll", "ece", "perplexity")
"""Metrics by which a decision or an export is judged, where a task has them."""

ROUNDING = 1e-6
"""What a decision is said to cost, a sum in single precision, is enough for it as a budget."""


def within_bops(run: Trained, share: float) -> tuple[Gates, float]:
    """Decision of little expected loss within a share of the bit operations at 32 x 32 bits."""
    network = run.model.network
    rest = network.frozen_macs * FULL_BITS**2
    whole = float(bit_operations(network).double().sum()) + rest
    budget = share * (1 + ROUNDING) * whole - rest
    return _within(run, layer_bops, budget, lambda cost: (cost + rest) / whole)


def within_bytes(run: Trained, size: float) -> tuple[Gates, float]:
    """Decision of little expected loss whose adapters, A, e and B, take so many bytes at most."""
    return _within(run, layer_bytes, size * (1 + ROUNDING), lambda cost: cost)


def _within(
    run: Trained, cost: Cost, budget: float, in_its_unit: Callable[[float], float]
) -> tuple[Gates, float]:
    network, decided = run.model.network, run.guide.decision()
    least = least_cost(network, decided, cost)
    if budget < least:
        raise InputError(
            f"a budget of {in_its_unit(budget):g} cannot be met: with every gate closed "
            f"{rounded_up(in_its_unit(least))} are left"
        )
    return allocate(network, decided, evidence(run), cost, budget)


def rounded_up(number: float) -> str:
    """Four digits that are no less than the number.

    Examples
    --------
    >>> rounded_up(0.0123412), rounded_up(1234512.0)
    ('0.01235', '1.235e+06')
    """
    unit = 10.0 ** (math.floor(math.log10(number)) - 3) if number > 0 else 1.0
    return f"{math.ceil(number / unit - ROUNDING) * unit:.4g}"


def evidence(run: Trained) -> Gates:
    """Log likelihood that every further component and level gains, as the posterior has it; nats.

    Raises
    ------
    InputError
        If the price that the run ended with cannot be read, or its priors are not those of the
        page, or its posterior is not finite.
    """
    gates = run.model.priors.gates
    known = gates.logits(run.model.network, run.model.bit_gates)
    for now, then in zip(
        known, (run.model.rank_prior_logits, run.model.bit_prior_logits), strict=True
    ):
        if not torch.allclose(now.to(then), then):
            raise InputError(
                f"{run.folder} was trained with other priors than those of models/priors.py, so "
                "nobody knows what its gates are worth: --min_probability needs no priors"
            )
    if isinstance(gates, GibbsGates):  # a budget has moved its price
        path = run.folder / "metrics.json"
        try:
            gates.price = float(json.loads(path.read_text(encoding="utf-8"))["price"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot read the price in {path} ({error})") from error
    found = worth(run.model, run.guide, refined=run.config.posterior.refine_epochs > 0)
    if not all(torch.isfinite(gain).all() for gain in found if gain is not None):
        raise InputError(f"the posterior of {run.folder} leaves gates without a finite worth")
    return found


def changes(run: Trained, new: Gates) -> list[str]:
    """One line for every layer of which something changes."""
    network, lines = run.model.network, []
    before, after = describe(network, run.gates), describe(network, new)
    names = short_names(network.specs)
    for name, old, now in zip(names, before.values(), after.values(), strict=True):
        parts = []
        ranks = [len(layer.get("components", ())) for layer in (old, now)]
        if ranks[0] != ranks[1]:
            parts.append(f"rank {ranks[0]} -> {ranks[1]}")
        bits = old.get("bits", {})
        parts += [f"{t} {b} -> {now['bits'][t]}" for t, b in bits.items() if b != now["bits"][t]]
        if parts:
            lines.append(f"{name:32} {', '.join(parts)}")
    return lines


def run(arguments: Sequence[str] | None = None) -> None:
    """Decide as the command line says; print what changes, and the score before and after."""
    parser = Parser(
        prog="bayes-lora decide",
        description="Decide ranks and bits of a finished run anew, without training.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="output folder of bayes-lora finetune")
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--max_bops", type=float, help="share of the bit operations at 32 x 32 bits")
    rule.add_argument("--max_bytes", type=float, help="of all adapters, A, e and B at their bits")
    rule.add_argument(
        "--min_probability", type=float, help="that a component or a level is needed; 0.5 to 1"
    )
    options = parser.parse_args(arguments)
    for name, most in (("max_bops", 1.0), ("max_bytes", np.inf)):
        value = getattr(options, name)
        if value is not None and not 0 < value < most:
            raise InputError(
                f"{name} is {value:g}: give a number > 0{' and < 1' if most == 1 else ''}"
            )
    least = options.min_probability
    if least is not None and not 0.5 <= least < 1:
        # the network settled without what is less probable than not: its weights are not trained
        raise InputError(f"min_probability is {least:g}: give one from 0.5 to below 1")
    quiet()
    found = read_run(options.run, decide=True)
    if not found.model.gated:
        raise InputError(f"{options.run} has no gates to decide: it was trained with --method lora")
    loss = None
    if options.max_bops is not None:
        new, loss = within_bops(found, options.max_bops)
        by = f"max_bops {options.max_bops:g}"
    elif options.max_bytes is not None:
        new, loss = within_bytes(found, options.max_bytes)
        by = f"max_bytes {options.max_bytes:g}"
    else:
        new = found.guide.decision(0.5 if least is None else least)
        by = MORE_PROBABLE_SIDE if least is None else f"min_probability {least:g}"
    data = validation_if_there(found)
    both = tqdm((found.gates, new), desc="validate", disable=None)
    rows = [judge(found, gates, data) for gates in both]
    print("\n".join(changes(found, new)) or "nothing changes")
    print(f"\n{'':28}{'before':>12}{'after':>12}")
    for name in rows[0]:
        print(f"{name:28}" + "".join(f"{row[name]:>12.5g}" for row in rows))
    if loss is not None:
        print(
            f"expected log likelihood of the training set, against {MORE_PROBABLE_SIDE}: "
            f"{0.0 - round(loss, 1):+.1f} nats"
        )
        closed = judge(found, new.map(torch.zeros_like), data)
        if closed.get("nll", np.inf) < rows[1].get("nll", -np.inf):
            print(
                f"bayes-lora: with every gate closed NLL is {closed['nll']:.5g}, better than this "
                "decision's: such a budget asks for a run trained for it, with --target_bops",
                file=sys.stderr,
            )
    path = options.run / "decision.json"
    write_decision(path, found.model.network, new, by)
    print(f"Written to {path}; `bayes-lora decide {options.run}` goes back to {MORE_PROBABLE_SIDE}")


def judge(run: Trained, gates: Gates, data: Validation | None) -> dict[str, float]:
    """Score, NLL and ECE on the validation set, if it is there, and costs, at a decision."""
    judged: dict[str, float] = {}
    if data is not None:
        prediction = predict(run.model, run.guide, data.loader, gates)
        metrics = evaluate_predictions(run.task, prediction, data.labels)
        judged = {name: metrics[name] for name in JUDGED if name in metrics}
    costs = totals(run.model.network, *gates)
    shown = ("relative_bops_32", "relative_bops_16", "adapter_bytes", "mean_rank")
    return judged | {name: costs[name] for name in shown}


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
