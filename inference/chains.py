"""Restarts as the chains of one bundle, and what they predict together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xarray as xr

from bayes_lora.inference.bundle import InferenceData
from bayes_lora.inference.predictive import (
    ClassProbabilities,
    NormalPredictions,
    Prediction,
    TextProbabilities,
)


def combine(chains: Sequence[InferenceData]) -> InferenceData:
    """Put restarts together as the chains of one bundle.

    Parameters
    ----------
    chains : sequence of InferenceData
        One a restart, of the same model and data.

    Returns
    -------
    InferenceData
        With a dimension `chain` as long as there are restarts; what has none is the first's.

    Raises
    ------
    ValueError
        If they have seen other examples.
    """
    if not all(chain["observed_data"].equals(chains[0]["observed_data"]) for chain in chains):
        raise ValueError("restarts must have seen the same examples")
    groups: dict[str, Any] = {}
    for name in chains[0].groups():
        parts = [chain[name] for chain in chains]
        if "chain" in parts[0].dims:
            numbered = [p.assign_coords(chain=[i]) for i, p in enumerate(parts)]
            groups[name] = xr.concat(
                numbered, dim="chain", data_vars="minimal", coords="minimal", compat="override",
                join="exact",
            )  # fmt: skip
        else:
            groups[name] = parts[0]
    return InferenceData(attrs=chains[0].attrs, **groups)


def pooled(bundle: InferenceData) -> Prediction:
    """Predictions of the validation set at all draws of all chains, which are the first axis."""
    stacked = bundle["predictions"].stack(sample=("chain", "draw")).transpose("sample", ...)
    for kind in (ClassProbabilities, NormalPredictions, TextProbabilities):
        if set(kind._fields) <= set(stacked):
            return kind(*(stacked[name].to_numpy() for name in kind._fields))
    raise ValueError(f"predictions are of no known kind: {', '.join(map(str, stacked))}")
