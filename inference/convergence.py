r"""Has training come to its end: what was learned, whether gates came to rest, and the ELBO then.

With the log likelihood under the guide, the divergences from the prior, and the price of bit
operations, which is a factor of the prior too,

    ELBO = log likelihood - kl_rank_gate - kl_bit_gate - T kl_adapter_weights - bops_cost + log Z,

where T is the temperature of the adapter weights and Z normalizes a prior with a price; it is not
computed, and 0 without a price. So sums of two prices are not comparable. Of weights that are a
point the divergence is minus their log prior density.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from bayes_lora.inference.bundle import InferenceData
from bayes_lora.inference.metrics import constant_nll

COSTS = ("kl_rank_gate", "kl_bit_gate", "kl_adapter_weights", "bops_cost")
TAIL = 5  # of the joint steps, the last one in so many is looked at
RESTLESS = 0.1  # a mean that changes by so many, and by this share, in the tail is not at rest


def gains(bundle: InferenceData) -> list[float] | None:
    """Log likelihood over that of the labels' frequencies, chain by chain: nats an example.

    Of the training examples in the bundle, mean of all draws. None for texts, and where all labels
    are the same.
    """
    labels = bundle["observed_data"]["label"].to_numpy()
    if "log_probability" in bundle["predictions"] or len(np.unique(labels)) < 2:
        return None
    constant = constant_nll(labels, "probability" not in bundle["predictions"])
    each = bundle["log_likelihood"]["label"].mean(("draw", "example"))
    return [round(float(value) + constant, 4) for value in each]


def movement(stats: xr.Dataset) -> dict[str, dict[str, float]]:
    """How far expected rank and bits moved over the last fifth of the joint steps.

    Mean over layers (and tensors), of the chain where it is largest: `change`, and `share` of the
    level. Empty where gates were refined after the joint phase, or never drawn.
    """
    phase = stats["phase"].to_numpy()
    joint = np.flatnonzero(phase == "joint")
    if not len(joint) or "refine" in phase:
        return {}
    found = {}
    for name in ("rank", "bits"):
        if (path := stats.get(f"{name}_trajectory")) is None:
            continue
        last = int(joint[-1])
        begun, ended = (
            path.isel(recorded_step=max(0, int((path["recorded_step"] <= step).sum()) - 1))
            for step in (last - len(joint) // TAIL, last)
        )
        over = [dim for dim in ended.dims if dim != "chain"]
        change, level = abs(ended - begun).mean(over), ended.mean(over)
        found[name] = {
            "change": round(float(change.max()), 4),
            "share": round(float((change / level.clip(1e-9)).max()), 4),
        }
    return found


def elbo_terms(stats: xr.Dataset, temperature: float) -> dict[str, float]:
    """Every term when gates were last sampled, and their sum up to log Z, of one chain; nats.

    Of the log likelihood, the mean of the last tenth of the steps in which gates were sampled. A
    run without gates has all terms at every step.
    """
    gates = [name for name in COSTS[:2] if stats[name].notnull().any()]
    names = [*gates, *(name for name in COSTS[2:] if stats[name].notnull().any())]
    rows = np.flatnonzero(np.all([stats[n].notnull() for n in gates or ["log_likelihood"]], axis=0))
    fit = float(stats["log_likelihood"][rows[-max(1, len(rows) // 10) :]].mean())
    costs = {name: float(stats[name][rows[-1]]) for name in names}
    weights = dict.fromkeys(names, 1.0) | {"kl_adapter_weights": temperature}
    total = fit - sum(weights[name] * cost for name, cost in costs.items())
    terms = {"log_likelihood": fit} | costs | {"sum": total}
    return {name: round(value, 3) for name, value in terms.items()}
