"""Read the bundle of a run, and refuse one that is not whole, by name of what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from bayes_lora.errors import InputError, one_line
from bayes_lora.gates import STRUCTURES
from bayes_lora.inference.bundle import InferenceData, read_bundle
from bayes_lora.inference.convergence import COSTS

NEEDED = {
    "posterior": {"relative_bops"},
    "prior": {"relative_bops"},
    "log_likelihood": {"label"},
    "observed_data": {"label"},
    "sample_stats": {"log_p", "log_q", "log_likelihood", *COSTS, "phase"},
    "predictions": set[str](),
    "predictions_constant_data": {"label"},
}  # fmt: skip
"""Variables of every group; `posterior_predictive` is for others to read."""
OF_GATES = {"rank": ("rank", "rank"), "bits": ("bit", "bits")}
"""What there is of each quantity in `posterior`: prefix of its probabilities, of its trajectory."""


def checked_bundle(run: str) -> InferenceData:
    """Read a run's bundle.

    Parameters
    ----------
    run : str
        Output folder of `bayes-lora finetune`.

    Raises
    ------
    InputError
        If the folder holds none, or it cannot be read, lacks something, or holds numbers that
        cannot be.
    """
    path = Path(run) / "posterior.nc"
    if Path(run).name == path.name:
        raise InputError(f"name the folder of the run, {Path(run).parent}, not a file in it")
    if not path.is_file():
        raise InputError(
            f"{run} holds no posterior.nc: name a folder that bayes-lora finetune wrote"
        )
    try:
        bundle = read_bundle(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error
    try:
        wrong = _lacking(bundle) or _impossible(bundle)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = one_line(error)
    if wrong:
        raise InputError(
            f"{path} is no whole bundle of this version ({wrong}): run bayes-lora finetune again"
        )
    return bundle


def _lacking(bundle: InferenceData) -> str:
    """What is not there, or nothing."""
    for group, names in NEEDED.items():
        if group not in bundle.groups():
            return f"it has no {group}"
        if lacks := sorted(names - set(bundle[group])):
            return f"{group} has no {lacks[0]}"
    stats = bundle["sample_stats"]
    for name, (kind, path) in OF_GATES.items():
        has = [f"{kind}_open_probability" in stats, f"{kind}_without_data" in stats,
               f"{path}_trajectory" in stats, name in bundle["posterior"],
               name in bundle["prior"]]  # fmt: skip
        if any(has) and not all(has):
            return f"of {name} something is not there"
    return ""


def _impossible(bundle: InferenceData) -> str:
    """Which numbers cannot be, or nothing."""
    attributes = bundle.attrs
    if attributes["rank_structure"] not in STRUCTURES or attributes["weight_posterior"] not in (
        "delta", "normal"
    ):  # fmt: skip
        return "rank_structure or weight_posterior is unknown"
    if not attributes["task"] or not float(attributes["weight_temperature"]) >= 0:
        return "task or weight_temperature is damaged"
    posterior, stats = bundle["posterior"], bundle["sample_stats"]
    if not bundle["observed_data"].sizes["example"] <= int(attributes["training_examples"]):
        return "training_examples is damaged"
    for group in ("log_likelihood", "sample_stats"):
        if any(bundle[group].sizes[dim] != posterior.sizes[dim] for dim in ("chain", "draw")):
            return f"{group} is of other draws than posterior"
    for group in (*NEEDED, "posterior_predictive"):
        for name, values in (bundle[group] if group in bundle.groups() else xr.Dataset()).items():
            if values.dtype.kind == "f" and not _finite(group, str(name), values):
                return f"{group} has a {name} that is not finite"
    for name in stats:
        if (
            str(name).endswith(("open_probability", "without_data"))
            and not ((stats[name] >= 0) & (stats[name] <= 1)).all()
        ):
            return f"{name} is no probability"
    for name in OF_GATES:
        if name in posterior and not all(
            posterior[dim].equals(bundle["prior"][dim])
            for dim in posterior[name].dims
            if dim not in ("chain", "draw")
        ):
            return "prior and posterior are of other layers"
    return ""


def _finite(group: str, name: str, values: xr.DataArray) -> bool:
    if group == "sample_stats" and "step" in values.dims:
        some = values.notnull()
        enough = some.any() if name == "log_likelihood" else True
        return bool(enough and np.isfinite(values.where(some, 0)).all())
    return bool(np.isfinite(values).all())
