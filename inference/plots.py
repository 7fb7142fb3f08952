"""Pictures of a posterior; each function returns a matplotlib figure."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bayes_lora.gates import level_weights, rank_probabilities
from bayes_lora.models.model import Gates
from bayes_lora.network import AdaptedNetwork


def plot_rank_and_bits(network: AdaptedNetwork, probabilities: Gates) -> Figure:
    """Heat maps of rank and bits, block by kind of layer, with their uncertainty.

    Parameters
    ----------
    network : AdaptedNetwork
        Names of the layers.
    probabilities : Gates
        Posterior open probabilities, shapes (L, R) and (L, T, K).

    Returns
    -------
    Figure
        One panel for the rank, one each for the bits of weight and input, or of the first two
        tensors that have gates where these have none. A cell shows the
        posterior mean, and below it the standard deviation where it is not negligible.

    Raises
    ------
    ValueError
        If there are no gates.
    """
    panels: list[tuple[str, torch.Tensor, torch.Tensor, float]] = []
    if probabilities.rank_gate is not None:
        ranks = torch.arange(network.rank + 1.0)
        distribution = rank_probabilities(probabilities.rank_gate.cpu(), network.structure)
        panels.append((f"rank (of {network.rank})", distribution, ranks, network.rank))
    if probabilities.bit_gate is not None:
        bits = torch.tensor(network.bits, dtype=torch.float)
        # the two whose product is the cost; of the adapter's, where these have no gates
        shown = [t for t in ("weight", "input") if t in network.quantized_tensors]
        for tensor in shown or network.quantized_tensors[:2]:
            gate = probabilities.bit_gate[:, network.quantized_tensors.index(tensor)]
            panels.append((f"bits of {tensor}", level_weights(gate.cpu()), bits, network.bits[-1]))
    if not panels:
        raise ValueError("without gates there is nothing to show")
    rows, columns, blocks, kinds = _grid(network)
    height = 1.6 + 0.42 * len(blocks)
    figure = Figure(figsize=(1.2 + 3.4 * len(panels), height), layout="constrained")
    for axes, (title, distribution, values, top) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        mean = distribution @ values
        deviation = (distribution @ values.square() - mean.square()).clamp_min(0).sqrt()
        picture: NDArray[np.float64] = np.full((len(blocks), len(kinds)), np.nan)
        picture[rows, columns] = mean.numpy()
        image = axes.imshow(picture, cmap="viridis", vmin=0, vmax=float(top), aspect="auto")
        for row, column, m, d in zip(rows, columns, mean.tolist(), deviation.tolist(), strict=True):
            text = f"{m:.1f}" if d < 0.05 else f"{m:.1f}\n±{d:.1f}"
            shade = "white" if m < 0.6 * float(top) else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=shade)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=7)
        axes.set_yticks(range(len(blocks)), blocks)
        figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    figure.axes[0].set_ylabel("block")
    return figure


def _grid(network: AdaptedNetwork) -> tuple[list[int], list[int], list[str], list[str]]:
    """Row (block) and column (kind of layer) of every layer, and the names of both."""
    blocks = list(dict.fromkeys(spec.block for spec in network.specs))
    kinds = list(dict.fromkeys(spec.kind for spec in network.specs))
    rows = [blocks.index(spec.block) for spec in network.specs]
    columns = [kinds.index(spec.kind) for spec in network.specs]
    short = [block.rpartition(".")[2] for block in blocks]
    names = short if len(set(short)) == len(short) else blocks
    return rows, columns, names, [kind.replace("attention.self.", "") for kind in kinds]
