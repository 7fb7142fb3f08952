"""What a posterior says, and whether to believe it, in numbers: the diagnostics of one run.

By layer: mean and highest-density interval of rank and bits, P(rank <= k), P(bits = b), and the
prior beside them. For the run: PSIS k-hat of the guide, agreement of restarts, gates that are
fixed and gates that the data said nothing about, terms of the ELBO, what collapsed and why.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import logit

from bayes_lora.inference.bundle import InferenceData, pareto_k
from bayes_lora.inference.convergence import elbo_terms, gains, movement
from bayes_lora.inference.summary import (
    bits_distribution,
    highest_density,
    mean_and_deviation,
    prior_distribution,
    rank_distribution,
)

MASS = 0.94  # of highest-density intervals, as in ArviZ
FIXED = 0.005  # a gate open, or closed, with less probability than this is fixed
UNMOVED = 0.02  # largest difference of a probability, or share of a mean, that is none
PSIS_DRAWS = 25  # that differ, at least


def diagnose(bundle: InferenceData) -> dict[str, Any]:
    """All diagnostics of one run, ready for JSON.

    Parameters
    ----------
    bundle : InferenceData
        As `finetune` writes it.

    Returns
    -------
    dict
        `layers`: by layer, its `rank` and the `bits` of every tensor. `run`: diagnostics of the
        whole. Probabilities are exact under the guide, averaged over the chains; those of the
        prior are frequencies over its draws.
    """
    rank, bits = rank_distribution(bundle), bits_distribution(bundle)
    layers: dict[str, dict[str, Any]] = {}
    if rank is not None:
        prior = prior_distribution(bundle, rank)
        for layer in rank["layer"].to_numpy():
            found = _describe(rank.sel(layer=layer), prior.sel(layer=layer))
            at_most = rank.mean("chain").sel(layer=layer).cumsum("rank").to_numpy()
            found["probability_at_most"] = at_most.round(6).tolist()
            layers.setdefault(str(layer), {})["rank"] = found
    if bits is not None:
        prior = prior_distribution(bundle, bits)
        for layer in bits["layer"].to_numpy():
            layers.setdefault(str(layer), {})["bits"] = {
                str(t): _describe(bits.sel(layer=layer, tensor=t), prior.sel(layer=layer, tensor=t))
                for t in bits["tensor"].to_numpy()
            }
    return {"run": _run(bundle, rank, bits), "layers": layers}


def _describe(chains: xr.DataArray, prior: xr.DataArray) -> dict[str, Any]:
    """Posterior and prior of one quantity, dims (chain, value) and (value)."""
    posterior = chains.mean("chain")
    name = str(posterior.dims[-1])
    values = posterior[name].to_numpy()
    mean, deviation = mean_and_deviation(posterior)
    return {
        "mean": round(float(mean), 4),
        "deviation": round(float(deviation), 4),
        "hdi": list(highest_density(posterior.to_numpy(), values, MASS)),
        "median": int(values[(posterior.cumsum(name) < 0.5).sum()]),
        "probability": _table(values, posterior),
        "prior_mean": round(float(mean_and_deviation(prior)[0]), 4),
        "prior_probability": _table(values, prior),
    }


def _table(values: np.ndarray, probability: xr.DataArray) -> dict[str, float]:
    return {str(v): round(float(p), 6) for v, p in zip(values, probability.to_numpy(), strict=True)}


def _run(
    bundle: InferenceData, rank: xr.DataArray | None, bits: xr.DataArray | None
) -> dict[str, Any]:
    stats, posterior = bundle["sample_stats"], bundle["posterior"]
    k, verdict = _pareto(bundle)
    found: dict[str, Any] = {
        "task": bundle.attrs["task"],
        "weight_posterior": bundle.attrs["weight_posterior"],
        "weight_temperature": (temperature := float(bundle.attrs["weight_temperature"])),
        "chains": posterior.sizes["chain"],
        "draws": posterior.sizes["draw"],
        "prior_draws": bundle["prior"].sizes["draw"],
        "relative_bops": {
            "mean": float(posterior["relative_bops"].mean()),
            "prior_mean": float(bundle["prior"]["relative_bops"].mean()),
        },
        "log_likelihood_gain": gains(bundle),
        "movement": movement(stats),
        "pareto_k": None if k is None else round(k, 3) if math.isfinite(k) else "inf",
        "pareto_k_verdict": verdict,
        "elbo_terms_nats": [
            elbo_terms(stats.isel(chain=c), temperature) for c in range(stats.sizes["chain"])
        ],
        "gates": {
            name: _gates(
                stats[f"{name}_open_probability"], stats[f"{name}_without_data"], stats[path]
            )
            for name, path in (("rank", "rank_trajectory"), ("bit", "bits_trajectory"))
            if f"{name}_open_probability" in stats
        },
    }  # fmt: skip
    if posterior.sizes["chain"] > 1:
        named = {"rank": rank, "bits": bits}
        found["restarts"] = {n: _agreement(d) for n, d in named.items() if d is not None}
    if rank is not None:
        found["collapsed"] = _collapsed(bundle, rank)
    return found


def _pareto(bundle: InferenceData) -> tuple[float | None, str]:
    """k-hat of the guide, and what to make of it in words; None where it is not defined."""
    stats = bundle["sample_stats"]
    temperature = float(bundle.attrs["weight_temperature"])
    if temperature != 1:
        return None, (
            f"not defined: at a weight temperature of {temperature:g} the guide approximates no "
            "posterior"
        )
    ratios = (stats["log_p"] - stats["log_q"]).to_numpy()
    draws, different = ratios.shape[1], min(len(np.unique(chain)) for chain in ratios)
    if different < PSIS_DRAWS:
        return None, f"not defined: {different} of {draws} draws differ, it takes {PSIS_DRAWS}"
    seen, of = bundle["observed_data"].sizes["example"], int(bundle.attrs["training_examples"])
    if (noise := _subsampling_noise(bundle)) > 1:
        return None, (
            f"not to be told: with the log likelihood of {seen} of {of} training examples, log p "
            f"of a draw is known to {noise:.0f} nats"
        )
    k, good = pareto_k(bundle), min(1 - 1 / math.log10(draws), 0.7)
    verdict = f"{k:.2f}"
    if k >= good:
        verdict += f", above {good:.2f}: {draws} draws cannot stand for the exact posterior"
    return k, verdict


def _subsampling_noise(bundle: InferenceData) -> float:
    """Standard error of log p as it differs from draw to draw, from the examples left out; nats."""
    of = int(bundle.attrs["training_examples"])
    each = bundle["log_likelihood"]["label"]
    seen = each.sizes["example"]
    if seen >= of:
        return 0.0
    differences = each - each.mean("draw")
    variance = differences.var("example", ddof=1).mean()
    return of * math.sqrt(float(variance) / seen * (1 - seen / of))


def _gates(
    probability: xr.DataArray, without_data: xr.DataArray, path: xr.DataArray
) -> dict[str, int]:
    """How many gates are fixed, of how many the data said nothing, how many never moved at all.

    What never moved are ranks, or bits of tensors, whose mean training has hardly changed.
    """
    mean = probability.mean("chain")
    change = abs(path - path.isel(recorded_step=0)).max(("chain", "recorded_step"))
    near = abs(probability - without_data).max("chain") < UNMOVED
    return {
        "all": int(mean.size),
        "fixed_open": int((mean > 1 - FIXED).sum()),
        "fixed_closed": int((mean < FIXED).sum()),
        "unmoved": int(near.sum()),
        "never_trained": int((change < UNMOVED * path.isel(recorded_step=0)).sum()),
    }


def _agreement(distribution: xr.DataArray) -> dict[str, float]:
    """Total variation distance between chains, and how often they decide alike."""
    name, chains = str(distribution.dims[-1]), distribution.sizes["chain"]
    pairs = [(a, b) for a in range(chains) for b in range(a)]
    distance = xr.concat(
        [0.5 * abs(distribution.isel(chain=a) - distribution.isel(chain=b)).sum(name)
         for a, b in pairs], dim="pair",
    )  # fmt: skip
    median = (distribution.cumsum(name) < 0.5).sum(name)
    alike = [(median.isel(chain=a) == median.isel(chain=b)).mean() for a, b in pairs]
    return {
        "mean_distance": round(float(distance.mean()), 4),
        "largest_distance": round(float(distance.max()), 4),
        "decided_alike": round(float(np.mean(alike)), 4),
    }


def _collapsed(bundle: InferenceData, rank: xr.DataArray) -> dict[str, dict[str, float]]:
    """Layers that probably have rank 0: log odds of any rank, in prior and posterior; nats.

    The prior's are from frequencies, hence with a standard error, or a bound where all of its draws
    are alike: the log of twice their number.
    """
    closed = rank.mean("chain").sel(rank=0).to_numpy()
    before = prior_distribution(bundle, rank).sel(rank=0).to_numpy()
    draws = bundle["prior"].sizes["draw"]
    bound = (before == 0) | (before == 1)
    before = before.clip(0.5 / draws, 1 - 0.5 / draws)
    prior, posterior = -logit(before), -logit(closed.clip(1e-12, 1 - 1e-12))
    error = 1 / np.sqrt(draws * before * (1 - before))
    return {
        str(layer): {
            "probability": round(float(p), 4),
            "prior_log_odds": round(float(x), 2),
            "prior_log_odds_error": round(float(s), 2),
            "prior_log_odds_bound": bool(b),
            "posterior_log_odds": round(float(y), 2),
        }
        for layer, p, x, s, b, y in zip(
            rank["layer"].to_numpy(), closed, prior, error, bound, posterior, strict=True
        )
        if p > 0.5
    }
