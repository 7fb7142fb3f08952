"""Bundles that are not whole, each refused by name of what is wrong."""

import numpy as np
import pytest
import torch

from bayes_lora.inference.bundle import write_bundle
from bayes_lora.inference.cli import main

RANK, BITS = torch.zeros(12, 3), torch.zeros(12, 6, 3)


def _without(group, name):
    def change(bundle):
        del bundle[group][name]

    return change


def _with(group, name, value):
    def change(bundle):
        values = bundle[group][name]
        values[(0,) * values.ndim] = value

    return change


def _fewer_chains(bundle):
    bundle.log_likelihood = bundle.log_likelihood.isel(draw=slice(7))


def _other_layers(bundle):
    bundle.prior = bundle.prior.assign_coords(layer=[f"x{k}" for k in range(12)])


def _no_prior(bundle):
    del bundle.prior


DAMAGE = {
    "it has no prior": _no_prior,
    "sample_stats has no kl_rank_gate": _without("sample_stats", "kl_rank_gate"),
    "posterior has no relative_bops": _without("posterior", "relative_bops"),
    "of rank something is not there": _without("sample_stats", "rank_without_data"),
    "of bits something is not there": _without("sample_stats", "bit_open_probability"),
    "of rank something": _without("sample_stats", "rank_trajectory"),
    "of rank": _without("prior", "rank"),
    "sample_stats has a log_p that is not finite": _with("sample_stats", "log_p", np.nan),
    "sample_stats has a rank_traj": _with("sample_stats", "rank_trajectory", np.nan),
    "predictions has a probability that": _with("predictions", "probability", np.nan),
    "posterior has a relative_bops that": _with("posterior", "relative_bops", np.nan),
    "log_likelihood has a label that": _with("log_likelihood", "label", -np.inf),
    "prior has a rank that": _with("prior", "rank", np.nan),
    "is no probability": _with("sample_stats", "rank_open_probability", 1.5),
    "log_likelihood is of other draws": _fewer_chains,
    "prior and posterior are of other layers": _other_layers,
    "'weight_temperature'": lambda bundle: bundle.attrs.pop("weight_temperature"),
    "rank_structure": lambda bundle: bundle.attrs.update(rank_structure="nesting"),
    "could not convert": lambda bundle: bundle.attrs.update(weight_temperature="x"),
    "invalid literal": lambda bundle: bundle.attrs.update(training_examples="many"),
    "training_examples is damaged": lambda bundle: bundle.attrs.update(training_examples=3),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_bundle_that_is_not_whole_is_refused_in_a_line(made_bundle, tmp_path, capsys, said):
    bundle = made_bundle(RANK, BITS)
    DAMAGE[said](bundle)
    write_bundle(tmp_path / "posterior.nc", bundle)
    assert main(["diagnose", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is no whole bundle of this version" in error
    assert said in error
    assert not {"diagnosis.json", "report.html"} & {path.name for path in tmp_path.iterdir()}
