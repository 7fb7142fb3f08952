"""The ArviZ bundle: groups, coordinates, and what ArviZ makes of it."""

import arviz as az
import matplotlib as mpl
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bayes_lora.gates import rank_probabilities
from bayes_lora.inference.bundle import compare, pareto_k, read_bundle, write_bundle
from bayes_lora.inference.chains import combine, pooled
from bayes_lora.inference.summary import (
    bits_distribution,
    calibration_curve,
    highest_density,
    mean_and_deviation,
    prior_distribution,
    rank_distribution,
)

mpl.use("Agg")
RANK = torch.tensor([[2.0, -1.0, 0.5]]).repeat(12, 1)
BITS = torch.linspace(-2, 2, 12 * 6 * 3).view(12, 6, 3)


def test_a_run_leaves_a_bundle_that_arviz_reads(command, tmp_path):
    code, _, err = command(seed=3)
    assert code == 0, err
    found = az.from_netcdf(tmp_path / "run" / "posterior.nc")
    assert set(found.groups()) >= {
        "posterior", "prior", "posterior_predictive", "log_likelihood", "observed_data",
        "sample_stats",
    }  # fmt: skip
    posterior = found.posterior
    assert posterior["rank_gate"].dims == ("chain", "draw", "layer", "component")
    assert posterior["bit_gate"].dims == ("chain", "draw", "layer", "tensor", "level")
    assert posterior.sizes["draw"] == 4
    assert found.prior.sizes["draw"] == 3
    assert found.predictions.sizes["draw"] == 2
    assert str(posterior["layer"][0].item()) == "bert.encoder.layer.0.attention.self.query"
    assert posterior["tensor"].to_numpy().tolist() == ["weight", "A", "e", "B", "input", "hidden"]
    assert posterior["level"].to_numpy().tolist() == [4, 8, 16]
    assert set(np.unique(posterior["rank_gate"])) <= {0.0, 1.0}
    rank = posterior["rank_gate"].cumprod("component").sum("component")
    assert (rank == posterior["rank"]).all()
    leading = posterior["bit_gate"].cumprod("level").sum("level")
    assert (2 ** (leading + 1) == posterior["bits"]).all()
    guide = load_file(tmp_path / "run" / "guide.safetensors")
    exact = rank_probabilities(guide["rank_logits"].sigmoid()).numpy()
    assert np.allclose(rank_distribution(found).isel(chain=0), exact, atol=1e-6)
    assert "adapter_weights" not in posterior
    stats = found.sample_stats
    assert np.isfinite(stats["objective"]).all()
    sampled = stats["phase"].isin(["anneal", "joint"])
    assert (np.isfinite(stats["elbo"]) == sampled).all()
    costs = sum(
        stats[n] for n in ("kl_adapter_weights", "kl_rank_gate", "kl_bit_gate", "bops_cost")
    )
    elbo = (stats["log_likelihood"] - costs)[:, sampled]
    assert np.allclose(stats["elbo"][:, sampled], elbo, rtol=1e-5)
    joint = stats["phase"] == "joint"
    assert np.allclose(stats["elbo"][:, joint], stats["objective"][:, joint], rtol=1e-4)
    assert list(dict.fromkeys(found.sample_stats["phase"].to_numpy())) == [
        "warmup", "anneal", "joint", "settle",
    ]  # fmt: skip


def test_what_arviz_makes_of_it(made_bundle):
    found = made_bundle(RANK, BITS)
    summary = az.summary(found, var_names=["rank"], kind="stats")
    assert len(summary) == 12
    assert az.plot_forest(found, var_names=["rank"]) is not None
    assert np.isfinite(az.loo(found).elpd_loo)
    table, words = compare({"a": found, "b": made_bundle(RANK, BITS, seed=1)})
    assert "elpd_loo" in words
    assert sorted(table) == ["a", "b"]
    assert table["a"]["elpd_loo"] == pytest.approx(az.loo(found).elpd_loo)
    k = az.loo(found, pointwise=True).pareto_k.to_numpy()
    assert table["a"]["share_of_bad_k"] == np.mean(k > table["a"]["good_k"])


def test_draws_agree_with_the_exact_distribution(made_bundle):
    draws = 4000
    found = made_bundle(RANK, BITS, draws=draws)
    for exact, name in ((rank_distribution(found), "rank"), (bits_distribution(found), "bits")):
        mean, deviation = mean_and_deviation(exact.isel(chain=0))
        error = (found.posterior[name].mean(("chain", "draw")) - mean) / (deviation / draws**0.5)
        assert float(abs(error).max()) < 4.5


def test_the_prior_beside_it(made_bundle):
    found = made_bundle(RANK, BITS)
    prior = prior_distribution(found, rank_distribution(found))
    assert prior.dims == ("layer", "rank")
    assert np.allclose(prior.sum("rank"), 1)
    closed = 1 / (1 + np.exp(-0.7))  # P(first gate closed) at logit -0.7
    error = (closed * (1 - closed) / (200 * 12)) ** 0.5
    assert float(prior.sel(rank=0).mean()) == pytest.approx(closed, abs=4.5 * error)


def test_restarts_become_chains(made_bundle, tmp_path):
    parts = [made_bundle(RANK, BITS, seed=s) for s in (0, 1, 2)]
    for k, part in enumerate(parts):
        write_bundle(tmp_path / f"{k}.nc", part)
    found = combine([read_bundle(tmp_path / f"{k}.nc") for k in range(3)])
    assert found.posterior.sizes["chain"] == 3
    assert found.posterior["chain"].to_numpy().tolist() == [0, 1, 2]
    for k, part in enumerate(parts):
        ours = found.posterior["rank"].isel(chain=k).to_numpy()
        assert np.array_equal(ours, part.posterior["rank"][0])
    assert "chain" not in found.observed_data.dims
    each = [part.predictions["probability"].to_numpy()[0] for part in parts]
    assert np.array_equal(pooled(found).probability, np.concatenate(each))
    assert np.isfinite(az.loo(found).elpd_loo)


def test_pareto_k_tells_a_guide_that_is_right_from_one_that_is_narrow(made_bundle):
    found = made_bundle(RANK, draws=1000)
    x = np.random.default_rng(0).standard_normal(1000)
    found.sample_stats["log_q"][0] = -0.5 * x**2
    found.sample_stats["log_p"][0] = -0.5 * x**2 / 1.1
    assert pareto_k(found) < 0.5
    found.sample_stats["log_p"][0] = -0.5 * x**2 / 9
    assert pareto_k(found) > 0.7
    found.sample_stats["log_p"][0] = found.sample_stats["log_q"][0] + np.arange(1000) // 999
    assert pareto_k(found) == np.inf  # one draw has all the weight
    found.sample_stats["log_p"][0, 7] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        pareto_k(found)


def test_pareto_k_is_the_worst_of_the_chains(made_bundle):
    parts = [made_bundle(RANK, draws=500, seed=s) for s in (0, 1)]
    x = np.random.default_rng(0).standard_normal(500)
    for part, spread in zip(parts, (1.1, 9), strict=True):
        part.sample_stats["log_q"][0] = -0.5 * x**2
        part.sample_stats["log_p"][0] = -0.5 * x**2 / spread + 100 * spread
    assert pareto_k(combine(parts)) == pareto_k(parts[1])


def test_runs_of_other_examples_are_not_compared(made_bundle):
    first, second = made_bundle(RANK), made_bundle(RANK, seed=1)
    second.observed_data["label"][0] = 1
    with pytest.raises(ValueError, match="cannot be compared"):
        compare({"a": first, "b": second})


def test_calibration_curve_by_hand(made_bundle):
    found = made_bundle(RANK)
    labels = found.predictions_constant_data["label"].to_numpy()
    probability = found.predictions["probability"]
    said = labels.copy()
    said[0] = 1 - said[0]  # one of nine is wrong
    probability[:] = np.where(np.arange(2) == said[:, None], 0.9, 0.1)
    curve = calibration_curve(found)
    assert curve.counts.tolist() == [9]
    assert curve.expected == pytest.approx([0.9])
    assert curve.observed == pytest.approx([8 / 9])


def test_highest_density_range():
    values = np.array([2, 4, 8, 16])
    assert highest_density(np.array([0.05, 0.6, 0.3, 0.05]), values, 0.9) == (4, 8)
    assert highest_density(np.array([0.96, 0.04, 0.0, 0.0]), values, 0.94) == (2, 2)
    assert highest_density(np.array([0.4, 0.1, 0.1, 0.4]), values, 0.94) == (2, 16)
