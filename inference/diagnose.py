"""Diagnose a posterior: `bayes-lora diagnose RUN [RUN ...]`, as text, JSON and report.html.

By layer: mean and highest-density interval of rank and bits, P(rank <= k), P(bits = b), and the
prior beside them. For the run: PSIS k-hat of the guide, agreement of restarts, gates that are
fixed and gates that the data said nothing about, terms of the ELBO, what collapsed and why.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.special import logit

from bayes_lora.errors import InputError
from bayes_lora.gates import STRUCTURES, GateStructure, nested, reach
from bayes_lora.inference.bundle import InferenceData, pareto_k, read_bundle
from bayes_lora.inference.cli import report_errors
from bayes_lora.inference.files import write_text
from bayes_lora.inference.report import report
from bayes_lora.inference.summary import (
    bits_distribution,
    highest_density,
    mean_and_deviation,
    prior_distribution,
    rank_distribution,
)

MASS = 0.94  # of highest-density intervals, as in ArviZ
FIXED = 0.005  # a gate open, or closed, with less probability than this is fixed
UNMOVED = 0.02  # largest difference of a gate's probability from its prior's that is none


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
    stats = bundle["sample_stats"]
    k, posterior = pareto_k(bundle), bundle["posterior"]
    found: dict[str, Any] = {
        "task": bundle.attrs["task"],
        "chains": posterior.sizes["chain"],
        "draws": posterior.sizes["draw"],
        "relative_bops": {
            "mean": float(posterior["relative_bops"].mean()),
            "prior_mean": float(bundle["prior"]["relative_bops"].mean()),
        },
        "pareto_k": None if np.isnan(k) else round(k, 3),
        "pareto_k_examples": [
            int(bundle["observed_data"].sizes["example"]), int(bundle.attrs["training_examples"])
        ],
        "elbo_terms_nats": _terms(stats.isel(chain=0)),
        "gates": {
            name: _gates(
                stats[f"{name}_open_probability"], bundle["prior"][f"{name}_gate"],
                STRUCTURES[bundle.attrs["rank_structure"]] if name == "rank" else nested,
            )
            for name in ("rank", "bit")
            if f"{name}_open_probability" in stats
        },
    }  # fmt: skip
    if posterior.sizes["chain"] > 1:
        named = {"rank": rank, "bits": bits}
        found["restarts"] = {n: _agreement(d) for n, d in named.items() if d is not None}
    if rank is not None:
        found["collapsed"] = _collapsed(bundle, rank)
    return found


def _terms(stats: xr.Dataset) -> dict[str, float]:
    """Last value of every term; of the log likelihood the mean of the last tenth of the steps."""
    names = ("kl_rank_gate", "kl_bit_gate", "kl_adapter_weights", "energy")
    last = {n: stats[n].dropna("step").to_numpy()[-1:] for n in names if n in stats}
    found = {n: round(float(v[0]), 3) for n, v in last.items() if len(v)}
    fit = stats["log_likelihood"][-max(1, stats.sizes["step"] // 10) :].mean()
    return {"log_likelihood": round(float(fit), 3)} | found


def _gates(
    probability: xr.DataArray, prior: xr.DataArray, structure: GateStructure
) -> dict[str, int]:
    """How many gates are fixed, and how many are where the prior has them, given they are reached.

    The prior's probability is a frequency: what is within two standard errors of it counts.
    """
    mean = probability.mean("chain")
    draws = prior.stack(sample=("chain", "draw")).transpose("sample", ...)
    before = draws.copy(data=reach(torch.from_numpy(draws.to_numpy()), structure).numpy())
    count = before.sum("sample")
    frequency = (before * draws).sum("sample") / count.clip(1)
    error = (frequency * (1 - frequency) / count.clip(1)) ** 0.5
    near = abs(mean - frequency) < (2 * error).clip(UNMOVED)
    return {
        "all": int(mean.size),
        "fixed_open": int((mean > 1 - FIXED).sum()),
        "fixed_closed": int((mean < FIXED).sum()),
        "as_in_the_prior": int((near & (count > 0)).sum()),
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

    The prior's are from frequencies, so at most the log of twice the number of its draws.
    """
    closed = rank.mean("chain").sel(rank=0).to_numpy()
    before = prior_distribution(bundle, rank).sel(rank=0).to_numpy()
    least = 0.5 / bundle["prior"].sizes["draw"]
    prior, posterior = -logit(before.clip(least, 1 - least)), -logit(closed.clip(1e-12, 1 - 1e-12))
    return {
        str(layer): {
            "probability": round(float(p), 4),
            "prior_log_odds": round(float(x), 2),
            "posterior_log_odds": round(float(y), 2),
        }
        for layer, p, x, y in zip(rank["layer"].to_numpy(), closed, prior, posterior, strict=True)
        if p > 0.5
    }


def text(found: dict[str, Any]) -> str:
    """The diagnostics as text, one line a layer."""
    run, lines = found["run"], []
    share = run["relative_bops"]
    examples, of = run["pareto_k_examples"]
    lines.append(f"{run['task']}: {run['chains']} chain(s) of {run['draws']} draws")
    lines.append(
        f"Bit operations: {share['mean']:.2%} of 32 x 32 bits (prior {share['prior_mean']:.2%})"
    )
    k = run["pareto_k"]
    verdict = "too few draws differ" if k is None else f"{k:.2f}"
    if k is not None and k >= 0.7:
        verdict += ", above 0.7: the draws cannot stand for the exact posterior"
    if examples < of:
        verdict += f" (inconclusive: from {examples} of {of} training examples)"
    lines.append(f"PSIS k-hat of the guide: {verdict}")
    lines.append(
        "ELBO of the first chain, nats: "
        + ", ".join(f"{n} {v:,.0f}" for n, v in run["elbo_terms_nats"].items())
    )
    for name, gates in run["gates"].items():
        lines.append(
            f"{name} gates: {gates['all']}, fixed open {gates['fixed_open']}, fixed closed "
            f"{gates['fixed_closed']}, as in the prior {gates['as_in_the_prior']}"
        )
    for name, agreement in run.get("restarts", {}).items():
        lines.append(
            f"restarts, {name}: total variation {agreement['mean_distance']:.3f} (largest "
            f"{agreement['largest_distance']:.3f}), {agreement['decided_alike']:.0%} decided alike"
        )
    for layer, why in run.get("collapsed", {}).items():
        prior, posterior = why["prior_log_odds"], why["posterior_log_odds"]
        cause = "the data speak against it" if posterior < prior else "prior and price outweigh it"
        lines.append(
            f"{layer}: rank 0 with probability {why['probability']:.2f}; log odds of any rank "
            f"{prior:+.1f} a priori, {posterior:+.1f} a posteriori: {cause}"
        )
    lines.append(f"Rank and bits: mean, {MASS:.0%} highest-density interval, prior mean")
    for layer, parts in found["layers"].items():
        cells = {"rank": parts["rank"]} if "rank" in parts else {}
        cells |= parts.get("bits", {})
        lines.append(
            f"{layer}  "
            + "  ".join(
                f"{n} {c['mean']:.1f} [{c['hdi'][0]}, {c['hdi'][1]}] ({c['prior_mean']:.1f})"
                for n, c in cells.items()
            )
        )
    return "\n".join(lines)


def load(run: str) -> InferenceData:
    """Read a run's bundle.

    Raises
    ------
    InputError
        If the folder holds none, or it cannot be read.
    """
    path = Path(run) / "posterior.nc"
    if not path.is_file():
        raise InputError(
            f"{run} holds no posterior.nc: name a folder that bayes-lora finetune wrote"
        )
    try:
        bundle = read_bundle(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not {"task", "rank_structure", "training_examples"} <= set(bundle.attrs):
        raise InputError(f"{path} is not of bayes-lora finetune: name a folder that it wrote")
    return bundle


def run(arguments: Sequence[str] | None = None) -> None:
    """Diagnose the runs that the command line names; write diagnosis.json and report.html."""
    folders = list(sys.argv[1:] if arguments is None else arguments)
    if not folders or folders[0] in ("-h", "--help"):
        print("usage: bayes-lora diagnose RUN [RUN ...]   (folders written by finetune)")
        if not folders:
            raise InputError("name a run")
        return
    bundles = {folder: load(folder) for folder in folders}
    for folder, bundle in bundles.items():
        found = diagnose(bundle)
        others = {name: other for name, other in bundles.items() if name != folder}
        description = text(found)
        page = report(folder, bundle, description, others)
        try:
            content = json.dumps(found, indent=2, allow_nan=False)
            write_text(Path(folder) / "diagnosis.json", content + "\n")
            write_text(Path(folder) / "report.html", page)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from error
        print(description)
        print(f"Diagnosis and report are in {folder}\n")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
