"""The table of every layer's rank and bits, with the posterior probability of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_lora.gates import level_weights, rank_probabilities
from bayes_lora.models.model import Gates
from bayes_lora.network import AdaptedNetwork
from bayes_lora.targets import LayerSpec


def rank_and_bits_table(network: AdaptedNetwork, probabilities: Gates, decision: Gates) -> str:
    """Lay out what was decided for every layer, and how probable that is.

    Parameters
    ----------
    network : AdaptedNetwork
        Names of the layers, kinds of tensors.
    probabilities : Gates
        Posterior open probabilities, shapes (L, R) and (L, T, K).
    decision : Gates
        Gates held at 0 or 1, of the same shapes.

    Returns
    -------
    str
        One line a layer. A cell is the decided rank, or bits, and its posterior probability
        in per cent, exact under the guide: `6 97%`.
    """
    columns: dict[str, list[str]] = {"layer": short_names(network.specs)}
    if probabilities.rank_gate is not None and decision.rank_gate is not None:
        chosen = network.structure(decision.rank_gate).sum(-1).long()
        distribution = rank_probabilities(probabilities.rank_gate, network.structure)
        mean = distribution @ torch.arange(network.rank + 1.0, device=distribution.device)
        columns["rank"] = _cells(chosen, chosen, distribution)
        columns["mean"] = [f"{m:.1f}" for m in mean.tolist()]
    if probabilities.bit_gate is not None and decision.bit_gate is not None:
        level = level_weights(decision.bit_gate).argmax(-1)
        bits = 2 ** (level + 1)
        distribution = level_weights(probabilities.bit_gate)
        for t, tensor in enumerate(network.quantized_tensors):
            columns[tensor] = _cells(bits[:, t], level[:, t], distribution[:, t])
    lines = [
        "Decided rank and bits of every layer, and their posterior probability.",
        _row(list(columns), columns),
    ]
    lines += [_row(cells, columns) for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines) + "\n"


def prior_table(network: AdaptedNetwork, draws: Mapping[str, NDArray[np.number]]) -> str:
    """Lay out what a prior implies for rank, bits and bit operations.

    Parameters
    ----------
    network : AdaptedNetwork
        Names of the layers, kinds of tensors.
    draws : mapping of str to ndarray
        Draws of `rank` (S, L), `bits` (S, L, T), as far as there are, and `relative_bops` (S,).

    Returns
    -------
    str
        One line a layer with the prior mean and standard deviation of its rank and bits; then the
        share of bit operations.
    """
    columns: dict[str, list[str]] = {"layer": short_names(network.specs)}
    if "rank" in draws:
        columns["rank"] = _spread(draws["rank"])
    if "bits" in draws:
        for t, tensor in enumerate(network.quantized_tensors):
            columns[tensor] = _spread(draws["bits"][:, :, t])
    low, middle, high = np.quantile(draws["relative_bops"], [0.05, 0.5, 0.95])
    lines = [
        f"Prior mean and standard deviation of rank (of {network.rank}) and bits, from "
        f"{len(draws['relative_bops'])} draws:",
        f"a mean is known to {len(draws['relative_bops']) ** -0.5:.0%} of the deviation beside it.",
        _row(list(columns), columns),
    ]
    lines += [_row(cells, columns) for cells in zip(*columns.values(), strict=True)]
    lines += [
        f"Bit operations relative to 32 x 32 bits: {middle:.2%}, "
        f"with prior probability 0.9 between {low:.2%} and {high:.2%}"
    ]
    return "\n".join(lines)


def _spread(draws: NDArray[np.number]) -> list[str]:
    pairs = zip(draws.mean(0).tolist(), draws.std(0).tolist(), strict=True)
    return [f"{mean:.1f} ±{deviation:.1f}" for mean, deviation in pairs]


def _cells(values: Tensor, index: Tensor, distribution: Tensor) -> list[str]:
    probability = distribution.gather(-1, index[:, None]).squeeze(-1)
    return [f"{v} {p:4.0%}" for v, p in zip(values.tolist(), probability.tolist(), strict=True)]


def short_names(specs: Sequence[LayerSpec]) -> list[str]:
    """Leave out what all paths begin with, but not the number of a block."""
    parts = [spec.path.split(".") for spec in specs]
    most = min(len(spec.block.split(".")) - 1 for spec in specs)
    common = 0
    while common < most and len({tuple(p[: common + 1]) for p in parts}) == 1:
        common += 1
    return [".".join(p[common:]) for p in parts]


def _row(cells: list[str] | tuple[str, ...], columns: dict[str, list[str]]) -> str:
    widths = [max(len(name), *map(len, column)) for name, column in columns.items()]
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])
