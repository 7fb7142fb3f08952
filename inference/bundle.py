"""The posterior of a run as an ArviZ bundle; the one file that imports ArviZ.

    posterior             rank_gate  (chain, draw, layer, component)        0 or 1
                          bit_gate   (chain, draw, layer, tensor, level)    0 or 1
                          rank       (chain, draw, layer)
                          bits       (chain, draw, layer, tensor)
                          relative_bops (chain, draw)                       of 32 x 32 bits
    prior                 the same, with draws of its own
    log_likelihood        label      (chain, draw, example)                 nats
    posterior_predictive  label      (chain, draw, example)                 not of texts
    observed_data         label      (example)
    sample_stats          log_q, log_p (chain, draw), nats
                          rank_open_probability (chain, layer, component)   of the guide, exact
                          bit_open_probability (chain, layer, tensor, level)
                          rank_without_data, bit_without_data: the same, if the data said nothing
                          log_likelihood, kl_..., bops_cost, price, ... (chain, step), nats
                          elbo, objective (chain, step), nats               of `History.traces`
                          phase (step)
                          rank_trajectory (chain, recorded_step, layer)     expected rank
                          bits_trajectory (chain, recorded_step, layer, tensor)
    predictions           probability (chain, draw, validation_example, class), or mean and
                          deviation, or log_probability, nats (chain, draw, validation_example)
    predictions_constant_data   label (validation_example)

A chain is an independent restart of SVI, a draw one of its guide, and these are independent: R-hat
and effective sample size say nothing about a guide, only chains compared do. Examples are training
examples, evenly spaced if there are more than are kept; `log_p` then scales their log likelihood up
to the whole training set. Log likelihoods and predictions are at the settled weights; the guide of
the gates is that of the weights before they settled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import arviz as az
import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from bayes_lora.flat_weights import weight_coordinates
from bayes_lora.gates import expected_bits
from bayes_lora.inference.draws import quantities
from bayes_lora.inference.files import write_whole
from bayes_lora.inference.history import History
from bayes_lora.inference.predictive import Prediction
from bayes_lora.models.model import Gates
from bayes_lora.network import AdaptedNetwork

Array = NDArray[Any]
InferenceData = az.InferenceData

DIMS = {
    "rank_gate": ["layer", "component"],
    "bit_gate": ["layer", "tensor", "level"],
    "rank": ["layer"],
    "bits": ["layer", "tensor"],
    "label": ["example"],
    "relative_bops": [],
    "adapter_weights": ["parameter"],
    "probability": ["validation_example", "class"],
    "mean": ["validation_example"],
    "deviation": ["validation_example"],
    "log_probability": ["validation_example"],
}
"""Dimensions of every variable that has one value a draw, after (chain, draw)."""


@dataclass(frozen=True)
class Draws:
    """What the guide of one run gives, at S draws.

    Attributes
    ----------
    gates : Gates
        Open or closed: shapes (S, L, R) and (S, L, T, K).
    log_likelihood, predicted_labels : Array
        Of n training examples, nats and labels: shapes (S, n). No labels of a language model.
    log_q, log_p : Array
        Log density of guide and model, nats, up to a constant: shapes (S,).
    predictions : Prediction
        Predictive distributions of the validation set, with a first axis S.
    adapter_weights : Array, optional
        Shape (S, P), if they are to be kept.
    """

    gates: Gates
    log_likelihood: Array
    predicted_labels: Array | None
    log_q: Array
    log_p: Array
    predictions: Prediction
    adapter_weights: Array | None = None


def bundle(
    network: AdaptedNetwork,
    draws: Draws,
    prior: Gates,
    prior_draws: int,
    history: History,
    labels: Mapping[int, float],
    validation_labels: Array,
    classes: Sequence[str],
    attributes: Mapping[str, str | float],
) -> az.InferenceData:
    """Put one run together as an `InferenceData` of one chain.

    Parameters
    ----------
    network : AdaptedNetwork
        Names of layers and tensors, and what gates cost.
    draws : Draws
        From the guide.
    prior, prior_draws : Gates, int
        Draws of the prior, and how many.
    history : History
        Of the training.
    labels : mapping of int to float
        Index in the training set and label of the n examples.
    validation_labels : Array
        Shape (validation examples,).
    classes : sequence of str
        Names of the classes; empty for a regression.
    attributes : mapping of str to str or float
        Of the whole bundle: version, task, method, number of training examples.

    Returns
    -------
    InferenceData
        Groups, dimensions and coordinates as at the head of this file.
    """
    posterior = quantities(network, draws.gates, len(draws.log_q))
    if draws.adapter_weights is not None:
        posterior["adapter_weights"] = draws.adapter_weights
    names = coordinates(network) | {"example": list(labels), "class": list(classes)}
    drawn = _of_draws(posterior, names)
    if draws.adapter_weights is not None:
        of_weight = weight_coordinates(network.specs, network.rank)
        drawn = drawn.assign_coords({name: ("parameter", v) for name, v in of_weight.items()})
    found = az.InferenceData(
        posterior=drawn,
        prior=_of_draws(quantities(network, prior, prior_draws), names),
        log_likelihood=_of_draws({"label": draws.log_likelihood}, names),
        observed_data=_dataset({"label": (["example"], np.array(list(labels.values())))}, names),
        sample_stats=_sample_stats(network, draws, history, names),
        predictions=_of_draws(draws.predictions._asdict(), names),
        predictions_constant_data=_dataset(
            {"label": (["validation_example"], validation_labels)}, names
        ),
        attrs=dict(attributes),
    )
    if (drawn_labels := draws.predicted_labels) is not None:
        found.add_groups(posterior_predictive=_of_draws({"label": drawn_labels}, names))
    return found


def _sample_stats(
    network: AdaptedNetwork, draws: Draws, history: History, names: Mapping[str, Sequence[Any]]
) -> xr.Dataset:
    phases = np.array([str(record["phase"]) for record in history.records])
    stats: dict[str, tuple[list[str], Array]] = {
        "log_q": (["chain", "draw"], draws.log_q[None]),
        "log_p": (["chain", "draw"], draws.log_p[None]),
        "phase": (["step"], phases),
    }
    traces = history.traces()
    traces["bops_cost"] = traces.pop("energy")  # to ArviZ, energy is that of Hamiltonian dynamics
    stats |= {name: (["chain", "step"], v[None]) for name, v in traces.items()}
    found = history.guide.open_probabilities()
    without_data = history.model.logits_without_data(found).map(torch.sigmoid)
    kinds = (
        ("rank", "rank", lambda gate: network.structure(gate).sum(-1)),
        ("bit", "bits", expected_bits),
    )
    for place, (kind, name, count) in enumerate(kinds):
        if (probability := found[place]) is None:
            continue
        dims = ["chain", *DIMS[f"{kind}_gate"]]
        path = torch.stack([count(gates[place]) for gates in history.gates.values()])
        stats[f"{kind}_open_probability"] = dims, _one(probability)
        stats[f"{kind}_without_data"] = dims, _one(cast(Tensor, without_data[place]))
        stats[f"{name}_trajectory"] = ["chain", "recorded_step", *DIMS[name]], _one(path)
    return _dataset(stats, {**names, "recorded_step": list(history.gates)})


def _of_draws(values: Mapping[str, Array], names: Mapping[str, Sequence[Any]]) -> xr.Dataset:
    return _dataset({k: (["chain", "draw", *DIMS[k]], v[None]) for k, v in values.items()}, names)


def _dataset(
    values: Mapping[str, tuple[list[str], Array]], names: Mapping[str, Sequence[Any]]
) -> xr.Dataset:
    """Variables with a coordinate for every dimension: a name where there is one, or a number."""
    sizes = {d: n for dims, v in values.values() for d, n in zip(dims, v.shape, strict=True)}
    return xr.Dataset(dict(values), {d: names.get(d) or np.arange(n) for d, n in sizes.items()})


def _one(value: Tensor) -> Array:
    return value[None].cpu().numpy()


def coordinates(network: AdaptedNetwork) -> dict[str, list[str] | list[int]]:
    """Names along every dimension: module paths, components from 1, tensors, bits a gate opens."""
    return {
        "layer": [spec.path for spec in network.specs],
        "component": list(range(1, network.rank + 1)),
        "tensor": list(network.quantized_tensors),
        "level": list(network.bits[1:]),
    }


def pareto_k(found: az.InferenceData) -> float:
    """PSIS k-hat of the guide: how heavy the tail of log p - log q is over its draws.

    The largest of the chains'; infinite where a few draws have all the weight. Below
    min(1 - 1 / log10(draws), 0.7) the guide's draws can stand for the posterior's (Yao et al. 2018,
    arXiv 1802.02538; Vehtari et al. 2024, JMLR 25:72). It takes some 25 draws that differ.

    Raises
    ------
    ValueError
        If a log density is not finite.
    """
    ratios = (found["sample_stats"]["log_p"] - found["sample_stats"]["log_q"]).to_numpy()
    if not np.isfinite(ratios).all():
        raise ValueError("log p or log q is not finite")
    each = np.array([float(az.psislw(chain)[1]) for chain in ratios])
    return float(np.where(np.isnan(each), np.inf, each).max())


def compare(runs: Mapping[str, az.InferenceData]) -> tuple[dict[str, dict[str, Any]], str]:
    """Compare runs by PSIS-LOO on the training examples that they share.

    Examples are known by their place and label; that they have the same texts is not checked.

    Returns
    -------
    tuple of dict and str
        By run a row of `az.compare`, with `share_of_bad_k`, of the examples whose Pareto k is above
        `good_k`; and the table of ArviZ.

    Raises
    ------
    ValueError
        If the runs are of other tasks, or kept other examples.
    """
    first, *others = runs.values()
    for other in others:
        if first.attrs["task"] != other.attrs["task"] or not first["observed_data"].equals(
            other["observed_data"]
        ):
            raise ValueError("the runs have seen other examples: they cannot be compared")
    with warnings.catch_warnings():  # of single examples, which are counted
        warnings.simplefilter("ignore", UserWarning)
        each = {name: az.loo(run, pointwise=True) for name, run in runs.items()}
        table = az.compare(each)
    rows = {str(name): row for name, row in table.to_dict(orient="index").items()}
    for name, found in each.items():
        rows[name]["share_of_bad_k"] = float((found.pareto_k > found.good_k).mean())
        rows[name]["good_k"] = float(found.good_k)
    return rows, str(table.to_string())


def write_bundle(path: Path, found: az.InferenceData) -> None:
    """Write a bundle as netCDF, whole or not at all."""
    write_whole(path, lambda partial: found.to_netcdf(str(partial)))


def read_bundle(path: Path) -> az.InferenceData:
    """Read a bundle into memory."""
    return az.from_netcdf(str(path)).load()
