"""Heat maps of rank and bits, of one run or of two side by side.

A row is a block of the network and a column a kind of layer; a cell shows the posterior mean, and
below it the standard deviation where it is not negligible.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from bayes_lora.inference.bundle import InferenceData
from bayes_lora.inference.summary import (
    NothingToShow,
    bits_distribution,
    mean_and_deviation,
    rank_distribution,
)
from bayes_lora.targets import LayerSpec

MAIN = ("rank", "bits of weight", "bits of input")  # the two tensors whose product is the cost


def plot_rank_and_bits(bundle: InferenceData) -> Figure:
    """Heat maps of the rank, and of the bits of weights and inputs, whose product is the cost.

    Where these have no gates, the first two tensors that have. A bundle without gates is a
    ValueError.
    """
    return _heat_maps(_main(_panels(bundle)))


def plot_rank(bundle: InferenceData) -> Figure:
    """Posterior mean rank of every layer, and its standard deviation.

    Of all chains together: where they disagree the deviation is large.

    A bundle without rank gates raises `NothingToShow`.
    """
    return _heat_maps([p for p in _panels(bundle) if p[0].startswith("rank")])


def plot_bits(bundle: InferenceData) -> Figure:
    """Posterior mean bits of every tensor, and their standard deviation.

    Of all chains together: where they disagree the deviation is large.

    A bundle without bit gates raises `NothingToShow`.
    """
    return _heat_maps([p for p in _panels(bundle) if p[0].startswith("bits")])


def plot_two_runs(first: InferenceData, second: InferenceData, names: tuple[str, str]) -> Figure:
    """Heat maps of two runs of the same network side by side, and what the second has more.

    Posterior mean and standard deviation, all chains of a run together; differences have a scale of
    their own.

    Of the quantities that both have, as `plot_rank_and_bits` chooses them. Runs whose layers
    differ, or that have no gates in common, are a ValueError.
    """
    ours, theirs = ({p[0].partition(" (")[0]: p for p in _panels(run)} for run in (first, second))
    both = [panel for name, panel in ours.items() if name in theirs]
    panels: list[Panel] = []
    for title, mean, deviation, top in _main(both):
        other_title, other, spread, other_top = theirs[title.partition(" (")[0]]
        if mean["layer"].to_numpy().tolist() != other["layer"].to_numpy().tolist():
            raise ValueError("the runs have other layers: they cannot be shown together")
        most, change = max(top, other_top), other - mean
        widest = max(1.0, float(abs(change).max()))
        panels += [(f"{title}\n{names[0]}", mean, deviation, most)]
        panels += [(f"{other_title}\n{names[1]}", other, spread, most)]
        both_spread = (deviation**2 + spread**2) ** 0.5
        quantity = title.partition(" (")[0]
        panels += [(f"{quantity}\n{names[1]}\nless {names[0]}", change, both_spread, -widest)]
    if not panels:
        raise NothingToShow("the runs have no gates in common: they cannot be shown together")
    return _heat_maps(panels)


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
        norm = _scale(title, top)
        image = axes.imshow(
            picture, cmap="RdBu_r" if top < 0 else "viridis", norm=norm, aspect="auto"
        )
        for row, column, m, d in zip(rows, kinds, mean.values, deviation.values, strict=True):
            m = round(float(m), 1) + 0.0  # no minus before a zero
            text = f"{m:.1f}" if d < 0.05 else f"{m:.1f}\n±{d:.1f}"
            dark = abs(m) > -0.6 * top if top < 0 else norm(m) < 0.6
            colour = "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
        axes.set_yticks(range(len(blocks)), blocks)
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        if isinstance(norm, LogNorm):
            ticks = [bits for bits in (2, 4, 8, 16, 32) if bits <= top]
            bar.set_ticks(ticks, labels=[str(bits) for bits in ticks])
            bar.minorticks_off()
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("block")
    return figure


def _scale(title: str, top: float) -> Normalize:
    """Colours: of bits by doublings, of ranks from 0, of differences about 0."""
    if top < 0:
        return Normalize(top, -top)
    return LogNorm(2, top) if title.startswith("bits") else Normalize(0, top)


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
