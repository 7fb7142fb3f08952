"""Pictures of a posterior; each function takes a bundle and returns a matplotlib figure.

The heat maps are in `heat_maps.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayes_lora.inference.bundle import InferenceData
from bayes_lora.inference.heat_maps import plot_bits, plot_rank
from bayes_lora.inference.summary import (
    NothingToShow,
    bits_distribution,
    calibration_curve,
    prior_distribution,
    rank_distribution,
)

PHASE_SHADES = {"anneal": "0.94", "joint": "0.88", "refine": "#fde9c9"}
PRIOR, POSTERIOR = "0.7", "#31688e"
TERMS = {
    "kl_rank_gate": "KL of rank gates",
    "kl_bit_gate": "KL of bit gates",
    "kl_adapter_weights": "KL of adapter weights",
    "bops_cost": "price of bit operations",
}


def plot_gate_trajectories(bundle: InferenceData) -> Figure:
    """Expected rank of every layer, and mean expected bits by tensor, over the training steps.

    Of the first chain.

    A bundle without gates raises `NothingToShow`.
    """
    stats = bundle["sample_stats"].isel(chain=0)
    kinds = [name for name in ("rank_trajectory", "bits_trajectory") if name in stats]
    if not kinds:
        raise NothingToShow("without such gates there is nothing to show")
    figure = Figure(figsize=(5.2 * len(kinds), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        path = stats[name]
        if name == "rank_trajectory":
            axes.plot(path["recorded_step"], path, color=POSTERIOR, lw=0.6, alpha=0.35)
            axes.plot(path["recorded_step"], path.mean("layer"), color="black", lw=1.6)
            axes.set_ylabel("expected rank; black: mean of layers")
        else:
            for tensor in path["tensor"].to_numpy():
                mean = path.sel(tensor=tensor).mean("layer")
                axes.plot(path["recorded_step"], mean, lw=1.4, label=tensor)
            axes.set_yscale("log", base=2)
            ticks = [bits for bits in (2, 4, 8, 16, 32) if bits < 2**0.1 * path.max()]
            axes.set_yticks(ticks, map(str, ticks))
            axes.set_ylabel("expected bits, mean of layers")
            axes.legend(fontsize=7, frameon=False, ncols=2)
        _shade_phases(axes, stats["phase"])
        axes.set_xlabel("step")
    return figure


def plot_elbo_terms(bundle: InferenceData) -> Figure:
    """Log likelihood, and every term that it is weighed against, over the steps; nats.

    Of the first chain. Terms are shown whole, also where they count less: all while they are
    annealed, and the divergence of the weights by its temperature.
    """
    stats = bundle["sample_stats"].isel(chain=0)
    figure = Figure(figsize=(10.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = stats["log_likelihood"]
    window = max(1, values.sizes["step"] // 50)
    left.plot(values["step"], values, color="0.8", lw=0.6)
    smooth = values.rolling({"step": window}, center=True, min_periods=1).mean()
    left.plot(values["step"], smooth, color=POSTERIOR, label="log likelihood")
    left.set_ylabel("of the training set (nats)")
    shown = {n: label for n, label in TERMS.items() if n in stats and stats[n].notnull().any()}
    for name, label in shown.items():
        right.plot(stats["step"], stats[name], lw=1.2, label=label)
    if of_gates := [stats[name].fillna(0) for name in shown if name != "kl_adapter_weights"]:
        sampled = stats["kl_rank_gate"].notnull() | stats["kl_bit_gate"].notnull()
        less = (smooth - sum(of_gates)).where(sampled)
        left.plot(values["step"], less, color="black", lw=1.2, label="less all costs of the gates")
        # while they are annealed the costs are far from what they come to
        settled = less.where(stats["phase"] == "joint") if "joint" in stats["phase"] else less
        low, high = float(min(settled.min(), smooth.min())), float(smooth.max())
        left.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        left.legend(fontsize=7, frameon=False)
    ends = [float(of(stats[name])) for name in shown for of in (np.nanmin, np.nanmax)]
    if min(ends) < max(ends) / 10:
        right.set_yscale("symlog", linthresh=10)
    right.set_ylabel("cost (nats)")
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        _shade_phases(axes, stats["phase"])
        axes.set_xlabel("step")
    return figure


def plot_prior_and_posterior(bundle: InferenceData) -> Figure:
    """Distributions of rank and of every tensor's bits, mean of layers: prior beside posterior.

    Of all chains together; the prior's are frequencies over its draws.

    A bundle without gates raises `NothingToShow`.
    """
    panels: list[tuple[str, xr.DataArray, xr.DataArray]] = []
    if (rank := rank_distribution(bundle)) is not None:
        panels.append(("rank", prior_distribution(bundle, rank), rank.mean("chain")))
    if (bits := bits_distribution(bundle)) is not None:
        prior = prior_distribution(bundle, bits)
        panels += [
            (f"bits of {t}", prior.sel(tensor=t), bits.mean("chain").sel(tensor=t))
            for t in bits["tensor"].to_numpy()
        ]
    if not panels:
        raise NothingToShow("without such gates there is nothing to show")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.3 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, (title, before, after) in zip(grid, panels, strict=False):
        place = np.arange(after.sizes[after.dims[-1]])
        axes.bar(place - 0.2, before.mean("layer"), 0.4, color=PRIOR, label="prior")
        axes.bar(place + 0.2, after.mean("layer"), 0.4, color=POSTERIOR, label="posterior")
        axes.set_xticks(place, after[after.dims[-1]].to_numpy())
        axes.set_title(title, fontsize=10)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.supylabel("probability, mean of layers", fontsize=9)
    return figure


def plot_reliability(bundle: InferenceData) -> Figure:
    """Reliability diagram of the predictions averaged over draws, on the validation set.

    Classification: accuracy against confidence, in 10 bins of the top probability, with the 95 %
    range of a calibrated prediction, and the number of examples. Regression: share of labels inside
    central intervals against their level.

    The bundle of a language model raises `NothingToShow`.
    """
    curve = calibration_curve(bundle)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    low = 0.0 if curve.is_regression else 1 / bundle["predictions"].sizes["class"]
    axes.plot([low, 1], [low, 1], color="0.6", lw=1, ls="--", label="calibrated")
    deviation = 1.96 * np.sqrt(curve.expected * (1 - curve.expected) / curve.counts)
    range_ = [(curve.expected + sign * deviation).clip(0, 1) for sign in (-1, 1)]
    axes.vlines(curve.expected, *range_, color="0.75", lw=5, label="95 % range if calibrated")
    axes.plot(
        curve.expected, curve.observed, "o-", ms=4, color=POSTERIOR, lw=1.2, label="predictions"
    )
    for x, y, count in zip(curve.expected, curve.observed, curve.counts, strict=True):
        axes.annotate(str(int(count)), (x, y), (4, -9), textcoords="offset points", fontsize=6)
    axes.set_xlabel("level of the interval" if curve.is_regression else "confidence")
    axes.set_ylabel("share of labels inside" if curve.is_regression else "accuracy")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _shade_phases(axes: Axes, phase: xr.DataArray) -> None:
    names = phase.to_numpy()
    starts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1), len(names)]
    for first, last in pairwise(starts):
        name = str(names[first])
        axes.axvspan(first, last, color=PHASE_SHADES.get(name, "white"), lw=0, zorder=0)
        axes.annotate(
            name, ((first + last) / 2, 1), (0, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontsize=6.5, color="0.4",
        )  # fmt: skip
    axes.set_xlim(0, len(names))


PLOTS: dict[str, Callable[[InferenceData], Any]] = {
    "Rank": plot_rank,
    "Bits": plot_bits,
    "Prior and posterior": plot_prior_and_posterior,
    "Gates over training": plot_gate_trajectories,
    "Terms of the ELBO": plot_elbo_terms,
    "Reliability": plot_reliability,
}
"""Title and function of every picture of one run."""
