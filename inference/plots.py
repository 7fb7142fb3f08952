"""Pictures of a posterior; each function takes a bundle and returns a matplotlib figure.

In a heat map a row is a block of the network and a column a kind of layer; a cell shows the
posterior mean, and below it the standard deviation where it is not negligible.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from bayes_lora.inference.bundle import InferenceData
from bayes_lora.inference.summary import (
    bits_distribution,
    calibration_curve,
    mean_and_deviation,
    prior_distribution,
    rank_distribution,
)
from bayes_lora.targets import LayerSpec


class NothingToShow(ValueError):
    """The bundle has no gates of the kind that the picture is of."""


MAIN = ("rank", "bits of weight", "bits of input")  # the two tensors whose product is the cost
PHASE_SHADES = {"anneal": "0.94", "joint": "0.88", "refine": "#fde9c9"}
PRIOR, POSTERIOR = "0.7", "#31688e"
TERMS = {
    "kl_rank_gate": "KL of rank gates",
    "kl_bit_gate": "KL of bit gates",
    "kl_adapter_weights": "KL of adapter weights",
    "energy": "price of bit operations",
}


def plot_rank_and_bits(bundle: InferenceData) -> Figure:
    """Heat maps of the rank, and of the bits of weights and inputs, whose product is the cost.

    Where these have no gates, the first two tensors that have. A bundle without gates is a
    ValueError.
    """
    return _heat_maps(_main(_panels(bundle)))


def plot_rank(bundle: InferenceData) -> Figure:
    """Posterior mean rank of every layer, and its standard deviation.

    A bundle without rank gates raises `NothingToShow`.
    """
    return _heat_maps([p for p in _panels(bundle) if p[0].startswith("rank")])


def plot_bits(bundle: InferenceData) -> Figure:
    """Posterior mean bits of every tensor, and their standard deviation.

    A bundle without bit gates raises `NothingToShow`.
    """
    return _heat_maps([p for p in _panels(bundle) if p[0].startswith("bits")])


def plot_two_runs(first: InferenceData, second: InferenceData, names: tuple[str, str]) -> Figure:
    """Heat maps of two runs of the same network side by side, and what the second has more.

    Of the quantities that both have, as `plot_rank_and_bits` chooses them, on one scale. Runs whose
    layers differ, or that have no gates in common, are a ValueError.
    """
    ours, theirs = ({p[0].partition(" (")[0]: p for p in _panels(run)} for run in (first, second))
    both = [panel for name, panel in ours.items() if name in theirs]
    panels: list[Panel] = []
    for title, mean, deviation, top in _main(both):
        _, other, spread, other_top = theirs[title.partition(" (")[0]]
        if mean["layer"].to_numpy().tolist() != other["layer"].to_numpy().tolist():
            raise ValueError("the runs have other layers: they cannot be shown together")
        most = max(top, other_top)
        panels += [(f"{title}: {names[0]}", mean, deviation, most)]
        panels += [(f"{title}: {names[1]}", other, spread, most)]
        panels += [(f"{title}: difference", other - mean, (deviation**2 + spread**2) ** 0.5, -most)]
    if not panels:
        raise NothingToShow("the runs have no gates in common: they cannot be shown together")
    return _heat_maps(panels)


def plot_gate_trajectories(bundle: InferenceData) -> Figure:
    """Expected rank of every layer, and mean expected bits by tensor, over the training steps.

    Of the first chain. A bundle without gates raises `NothingToShow`.
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
            ticks = [bits for bits in (2, 4, 8, 16, 32) if bits <= path.max()]
            axes.set_yticks(ticks, map(str, ticks))
            axes.set_ylabel("expected bits, mean of layers")
            axes.legend(fontsize=7, frameon=False, ncols=2)
        _shade_phases(axes, stats["phase"])
        axes.set_xlabel("line of the history")
    return figure


def plot_elbo_terms(bundle: InferenceData) -> Figure:
    """Log likelihood, and every term that it is weighed against, over the steps; nats.

    Of the first chain.
    """
    stats = bundle["sample_stats"].isel(chain=0)
    figure = Figure(figsize=(10.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = stats["log_likelihood"]
    window = max(1, values.sizes["step"] // 50)
    left.plot(values["step"], values, color="0.8", lw=0.6)
    smooth = values.rolling({"step": window}, center=True, min_periods=1).mean()
    left.plot(values["step"], smooth, color=POSTERIOR)
    left.set_ylabel("log likelihood of the training set (nats)")
    for name, label in TERMS.items():
        if name in stats and not stats[name].isnull().all():
            right.plot(stats["step"], stats[name], lw=1.2, label=label)
    right.set_yscale("symlog", linthresh=10)
    right.set_ylabel("cost (nats)")
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        _shade_phases(axes, stats["phase"])
        axes.set_xlabel("line of the history")
    return figure


def plot_prior_and_posterior(bundle: InferenceData) -> Figure:
    """Distributions of rank and of every tensor's bits, mean of layers: prior beside posterior.

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

    Classification: accuracy against confidence, in bins of the top probability, with the 95 %
    range of a calibrated prediction. Regression: share of labels inside central intervals
    against their level.
    """
    curve = calibration_curve(bundle)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    low = 0.0 if curve.is_regression else 1 / bundle["predictions"].sizes["class"]
    axes.plot([low, 1], [low, 1], color="0.6", lw=1, ls="--", label="calibrated")
    deviation = 1.96 * np.sqrt(curve.expected * (1 - curve.expected) / curve.counts)
    range_ = [(curve.expected + sign * deviation).clip(0, 1) for sign in (-1, 1)]
    axes.vlines(curve.expected, *range_, color="0.75", lw=5, label="95 % range if calibrated")
    axes.plot(curve.expected, curve.observed, "o-", ms=4, color=POSTERIOR, lw=1.2)
    for x, y, count in zip(curve.expected, curve.observed, curve.counts, strict=True):
        axes.annotate(str(int(count)), (x, y), (4, -9), textcoords="offset points", fontsize=6)
    axes.set_xlabel("level of the interval" if curve.is_regression else "confidence")
    axes.set_ylabel("share of labels inside" if curve.is_regression else "accuracy")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


Panel = tuple[str, xr.DataArray, xr.DataArray, float]


def _panels(bundle: InferenceData) -> list[Panel]:
    """Title, mean and deviation by layer, and top of the scale, of rank and of every tensor."""
    panels: list[Panel] = []
    if (rank := rank_distribution(bundle)) is not None:
        top = int(rank["rank"].max())
        panels.append((f"rank (of {top})", *mean_and_deviation(rank.mean("chain")), float(top)))
    if (bits := bits_distribution(bundle)) is not None:
        for tensor in bits["tensor"].to_numpy():
            found = mean_and_deviation(bits.mean("chain").sel(tensor=tensor))
            panels.append((f"bits of {tensor}", *found, float(bits["bits"].max())))
    return panels


def _main(panels: list[Panel]) -> list[Panel]:
    """Rank, and the bits of weight and input; without gates there, the first two that have."""
    shown = [p for p in panels if p[0].startswith(MAIN)]
    ranks = [p for p in panels if p[0].startswith("rank")]
    return shown if len(shown) > len(ranks) else [*ranks, *panels[len(ranks) :][:2]]


def _heat_maps(panels: list[Panel]) -> Figure:
    if not panels:
        raise NothingToShow("without such gates there is nothing to show")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    rows, kinds, blocks, names = _grid(panels[0][1]["layer"].to_numpy())
    size = (1.2 + 3.4 * columns, (1.6 + 0.42 * len(blocks)) * lines)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (title, mean, deviation, top) in zip(grid.flat, panels, strict=False):
        picture = np.full((len(blocks), len(names)), np.nan)
        picture[rows, kinds] = mean.to_numpy()
        image = _image(axes, picture, top)
        for row, column, m, d in zip(rows, kinds, mean.values, deviation.values, strict=True):
            text = f"{m:.1f}" if d < 0.05 else f"{m:.1f}\n±{d:.1f}"
            dark = m < 0.6 * top if top > 0 else abs(m) > -0.6 * top
            colour = "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
        axes.set_yticks(range(len(blocks)), blocks)
        figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("block")
    return figure


def _image(axes: Axes, picture: np.ndarray, top: float) -> AxesImage:
    if top < 0:  # a difference
        return axes.imshow(picture, cmap="RdBu_r", vmin=top, vmax=-top, aspect="auto")
    return axes.imshow(picture, cmap="viridis", vmin=0, vmax=top, aspect="auto")


def _grid(layers: np.ndarray) -> tuple[list[int], list[int], list[str], list[str]]:
    """Row (block) and column (kind of layer) of every layer, and the names of both."""
    specs = [LayerSpec(str(path), 0, 0) for path in layers]
    blocks = list(dict.fromkeys(spec.block for spec in specs))
    kinds = list(dict.fromkeys(spec.kind for spec in specs))
    rows = [blocks.index(spec.block) for spec in specs]
    columns = [kinds.index(spec.kind) for spec in specs]
    short = [block.rpartition(".")[2] for block in blocks]
    names = short if len(set(short)) == len(short) else blocks
    return rows, columns, names, [kind.replace("attention.self.", "") for kind in kinds]


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
