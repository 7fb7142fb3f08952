"""Distributions of rank and bits as a bundle has them: exact under the guide, by chain or averaged.

The prior's are frequencies over its draws, as a coupled prior has no closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from bayes_lora.gates import STRUCTURES, level_weights, rank_probabilities
from bayes_lora.inference.bundle import InferenceData
from bayes_lora.inference.chains import pooled
from bayes_lora.inference.metrics import COVERAGE_LEVELS, coverage
from bayes_lora.inference.predictive import NormalPredictions, TextProbabilities

BINS = 10  # of confidence, in a reliability diagram


class NothingToShow(ValueError):
    """The bundle has nothing of the kind that a picture is of."""


def rank_distribution(bundle: InferenceData) -> xr.DataArray | None:
    """P(rank = k) of every layer and chain, dims (chain, layer, rank); None without rank gates."""
    stats = bundle["sample_stats"]
    if "rank_open_probability" not in stats:
        return None
    probability = stats["rank_open_probability"]
    structure = STRUCTURES[bundle.attrs["rank_structure"]]
    values = rank_probabilities(torch.from_numpy(probability.to_numpy()).double(), structure)
    ranks = np.arange(probability.sizes["component"] + 1)
    return xr.DataArray(
        values.numpy(),
        dims=("chain", "layer", "rank"),
        coords={"chain": probability["chain"], "layer": probability["layer"], "rank": ranks},
    )


def bits_distribution(bundle: InferenceData) -> xr.DataArray | None:
    """P(bits = b), dims (chain, layer, tensor, bits); None without bit gates."""
    stats = bundle["sample_stats"]
    if "bit_open_probability" not in stats:
        return None
    probability = stats["bit_open_probability"]
    values = level_weights(torch.from_numpy(probability.to_numpy()).double())
    return xr.DataArray(
        values.numpy(),
        dims=("chain", "layer", "tensor", "bits"),
        coords={name: probability[name] for name in ("chain", "layer", "tensor")}
        | {"bits": [2, *probability["level"].to_numpy()]},
    )


def prior_distribution(bundle: InferenceData, like: xr.DataArray) -> xr.DataArray:
    """Frequencies of the same ranks, or bits, over the prior's draws; dims of `like` less chain."""
    name = str(like.dims[-1])
    draws = bundle["prior"][name]
    shares = [(draws == value).mean(("chain", "draw")) for value in like[name].to_numpy()]
    return xr.concat(shares, dim=like[name]).transpose(*like.dims[1:])


def mean_and_deviation(distribution: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Mean and standard deviation over the last dimension, its coordinate the values."""
    name = str(distribution.dims[-1])
    values = distribution[name]
    mean = (distribution * values).sum(name)
    variance = (distribution * values**2).sum(name) - mean**2
    return mean, variance.clip(0) ** 0.5


def highest_density(
    probabilities: NDArray[np.floating], values: NDArray[np.integer], mass: float
) -> tuple[int, int]:
    """Shortest range of ordered values with at least this probability; the likelier of equals.

    Examples
    --------
    >>> highest_density(np.array([0.05, 0.6, 0.3, 0.05]), np.array([2, 4, 8, 16]), 0.9)
    (4, 8)
    """
    for length in range(1, len(values) + 1):
        inside = np.convolve(probabilities, np.ones(length), mode="valid")
        first = int(inside.argmax())
        if inside[first] >= mass - 1e-9:
            return int(values[first]), int(values[first + length - 1])
    raise ValueError(f"probabilities add up to {probabilities.sum()}, which is less than {mass}")


class CalibrationCurve(NamedTuple):
    """What was predicted and what happened, bin by bin or level by level.

    Attributes
    ----------
    expected, observed : ndarray
        Mean confidence and accuracy of a bin; or level of the intervals and share of the labels
        inside.
    counts : ndarray
        Examples a bin; or all of them.
    is_regression : bool
        Which of the two it is.
    """

    expected: NDArray[np.floating]
    observed: NDArray[np.floating]
    counts: NDArray[np.integer]
    is_regression: bool


def calibration_curve(bundle: InferenceData) -> CalibrationCurve:
    """Calibration on the validation set of the predictions averaged over all chains and draws."""
    prediction = pooled(bundle).averaged()
    labels = bundle["predictions_constant_data"]["label"].to_numpy()
    if isinstance(prediction, TextProbabilities):
        raise NothingToShow("of a language model there is no calibration curve")
    if isinstance(prediction, NormalPredictions):
        mean, deviation = prediction
        inside = coverage(mean, deviation, labels)
        counts = np.full(len(inside), len(labels))
        return CalibrationCurve(COVERAGE_LEVELS, inside, counts, is_regression=True)
    (probability,) = prediction
    confidence, correct = probability.max(-1), probability.argmax(-1) == labels
    place = np.ceil(confidence * BINS).astype(int)
    counts = np.bincount(place, minlength=BINS + 1)
    used = counts > 0
    expected, observed = (
        np.bincount(place, w, minlength=BINS + 1)[used] / counts[used]
        for w in (confidence, correct)
    )
    return CalibrationCurve(expected, observed, counts[used], is_regression=False)
