"""`bayes-lora diagnose`: the numbers, the report, and what can be wrong with a run."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from bayes_lora.inference.bundle import write_bundle
from bayes_lora.inference.chains import combine
from bayes_lora.inference.cli import main
from bayes_lora.inference.convergence import movement
from bayes_lora.inference.description import text
from bayes_lora.inference.diagnosis import diagnose

RANK = torch.zeros(12, 3)
RANK[0] = torch.tensor([np.log(4.0), -np.log(3.0), 0.0])  # open with 0.8, 0.25, 0.5
RANK[1, 0] = -np.log(9.0)  # rank 0 with 0.9
RANK[2] = 9.0  # open for sure
BITS = torch.zeros(12, 6, 3)
BITS[0, 4] = torch.tensor([9.0, 9.0, -9.0])  # 8 bits for sure


def test_a_layer_in_numbers(made_bundle):
    found = diagnose(made_bundle(RANK, BITS))
    layer = found["layers"]["bert.encoder.layer.0.attention.self.query"]
    rank = layer["rank"]
    assert rank["mean"] == pytest.approx(0.8 + 0.2 + 0.1, abs=1e-4)
    assert list(rank["probability"].values()) == pytest.approx([0.2, 0.6, 0.1, 0.1], abs=1e-6)
    assert rank["probability_at_most"] == pytest.approx([0.2, 0.8, 0.9, 1.0], abs=1e-6)
    assert (rank["median"], rank["hdi"]) == (1, [0, 3])
    prior = 1 / (1 + np.exp(-0.7))
    assert rank["prior_probability"]["0"] == pytest.approx(prior, abs=4.5 * 0.035)
    frequencies = rank["prior_probability"].items()
    assert rank["prior_mean"] == pytest.approx(sum(int(k) * p for k, p in frequencies), abs=1e-4)
    assert layer["bits"]["input"]["hdi"] == [8, 8]
    assert layer["bits"]["input"]["median"] == 8
    assert layer["bits"]["weight"]["probability"]["2"] == pytest.approx(0.5)


def test_the_run_in_numbers(made_bundle):
    bundle = made_bundle(RANK, BITS)
    run = diagnose(bundle)["run"]
    assert run["gates"]["rank"]["all"] == 36
    assert run["gates"]["rank"]["fixed_open"] == 3
    assert run["gates"]["bit"]["fixed_open"] == 2
    assert run["gates"]["bit"]["fixed_closed"] == 1
    # the last of the two joint steps, not the settling, where gates have no divergence
    assert run["elbo_terms_nats"] == [{
        "log_likelihood": -58.0, "kl_rank_gate": 20.0, "kl_bit_gate": 20.0,
        "kl_adapter_weights": 3.0, "bops_cost": 5.0, "sum": -106.0,
    }]  # fmt: skip
    assert run["relative_bops"]["mean"] == bundle.posterior["relative_bops"].mean()
    assert run["relative_bops"]["prior_mean"] == bundle.prior["relative_bops"].mean()
    collapsed = run["collapsed"]
    assert list(collapsed) == ["bert.encoder.layer.0.attention.self.key"]
    why = collapsed["bert.encoder.layer.0.attention.self.key"]
    assert why["probability"] == 0.9
    assert why["posterior_log_odds"] == pytest.approx(-np.log(9.0), abs=0.01)
    # from 200 draws of probability sigmoid(-0.7)
    assert why["prior_log_odds_error"] == pytest.approx((200 * 0.332 * 0.668) ** -0.5, rel=0.2)
    assert why["prior_log_odds"] == pytest.approx(-0.7, abs=4.5 * why["prior_log_odds_error"])


def test_gates_that_training_never_moved_are_told(made_bundle):
    bundle = made_bundle(RANK, BITS)
    gates = diagnose(bundle)["run"]["gates"]
    assert (gates["rank"]["never_trained"], gates["bit"]["never_trained"]) == (12, 72)
    assert "rank gates: in 12 of the layers they are where training began" in text(diagnose(bundle))
    bundle.sample_stats["rank_trajectory"][0, -1, :5] -= 0.5
    found = diagnose(bundle)
    assert found["run"]["gates"]["rank"]["never_trained"] == 7
    bundle.sample_stats["rank_trajectory"][0, -1] -= 0.5
    bundle.sample_stats["bits_trajectory"][0, -1] -= 0.5
    assert "where training began" not in text(diagnose(bundle))


def test_a_collapse_within_the_error_of_the_prior_has_no_cause(made_bundle):
    """The prior's log odds are -0.7."""
    for logit, said in ((-0.75, "as far as its draws tell"), (-2.5, "data speak against any rank")):
        rank = RANK.clone()
        rank[1] = logit
        assert said in text(diagnose(made_bundle(rank)))


def test_gates_of_which_the_data_said_nothing_are_told_from_others(made_bundle):
    """The prior's logits are -0.7 and 0.3."""
    at_prior = made_bundle(torch.full((12, 3), -0.7), torch.full((12, 6, 3), 0.3))
    gates = diagnose(at_prior)["run"]["gates"]
    assert (gates["rank"]["unmoved"], gates["bit"]["unmoved"]) == (36, 216)
    rank = torch.full((12, 3), -0.7)
    rank[:, 1] += 0.15  # a probability 0.034 higher
    moved = made_bundle(rank, torch.full((12, 6, 3), 7.0), seed=1)
    gates = diagnose(moved)["run"]["gates"]
    assert (gates["rank"]["unmoved"], gates["bit"]["unmoved"]) == (24, 0)


@pytest.mark.parametrize(
    ("spread", "temperature", "examples", "said"),
    [
        (0.0, 1.0, 9, "not defined: 1 of 60 draws differ"),
        (0.02, 1.0, 9, "0."),
        (3000.0, 1.0, 9, "inf, above 0.44: 60 draws cannot stand for the exact posterior"),
        (0.02, 0.001, 9, "not defined: at a weight temperature of 0.001"),
        (0.02, 1.0, 80, "not to be told: with the log likelihood of 9 of 80 training examples"),
    ],
)
def test_what_k_hat_says(made_bundle, spread, temperature, examples, said):
    bundle = made_bundle(RANK)
    bundle.attrs |= {"weight_temperature": temperature, "training_examples": examples}
    ratios = spread * np.random.default_rng(4).standard_normal(60)
    bundle.sample_stats["log_p"][0] = bundle.sample_stats["log_q"][0] * 0 + ratios
    bundle.sample_stats["log_q"][0] = 0 * ratios
    found = diagnose(bundle)["run"]
    assert said in found["pareto_k_verdict"]
    assert (found["pareto_k"] is None) == (said.startswith("not"))
    json.dumps(found, allow_nan=False)


def test_the_noise_of_examples_left_out(made_bundle):
    """Normal log likelihoods of deviation 0.5: 80 * 0.5 / sqrt(9) * sqrt(1 - 9 / 80)."""
    bundle = made_bundle(RANK)
    drawn = 0.5 * np.random.default_rng(7).standard_normal((1, 60, 9))
    bundle.log_likelihood["label"][:] = drawn
    verdict = diagnose(bundle)["run"]["pareto_k_verdict"]
    assert float(verdict.split()[-2]) == pytest.approx(12.56, abs=4 * 12.56 / (2 * 59 * 8) ** 0.5)


def test_restarts_that_disagree(made_bundle):
    other = RANK.clone()
    other[0] = -9.0
    both = combine([made_bundle(RANK, BITS), made_bundle(other, BITS, seed=1)])
    found = diagnose(both)
    rank = found["run"]["restarts"]["rank"]
    assert rank["largest_distance"] == pytest.approx(0.8, abs=1e-3)
    assert rank["mean_distance"] == pytest.approx(0.8 / 12, abs=1e-3)
    assert rank["decided_alike"] == pytest.approx(11 / 12, abs=1e-4)
    assert found["run"]["restarts"]["bits"]["largest_distance"] == 0
    assert "restarts, rank: total variation 0.067 (largest 0.800), 92% decided alike" in text(found)


def test_the_command_writes_text_json_and_a_report_of_its_own(made_bundle, tmp_path, capsys):
    for name, bits, seed in (("first", BITS, 0), ("second", BITS + 1, 1), ("lora", None, 2)):
        (tmp_path / name).mkdir()
        rank = RANK if bits is not None else None
        write_bundle(tmp_path / name / "posterior.nc", made_bundle(rank, bits, seed=seed))
    folders = [str(tmp_path / name) for name in ("first", "second", "lora")]
    assert main(["diagnose", *folders]) == 0
    printed = capsys.readouterr().out
    query = next(line for line in printed.splitlines() if "0.attention.self.query" in line)
    assert "  rank 1.1 [0, 3] " in query
    assert printed.count("Rank and bits") == 2  # lora has none
    assert "rank 0 with probability 0.90" in printed
    assert "the data speak against any rank" in printed
    found = json.loads((tmp_path / "first" / "diagnosis.json").read_text())
    assert len(found["layers"]) == 12
    assert "elpd_loo" in found["beside"][folders[1]]["text"]
    assert set(found["beside"][folders[1]]["table"]) == set(folders[:2])
    assert "elpd_loo" in printed
    page = (tmp_path / "first" / "report.html").read_text()
    at_most = found["layers"]["bert.encoder.layer.0.attention.self.query"]["rank"]
    assert f"{at_most['probability_at_most'][1]:.2f} (" in page
    assert page.count("<details>") == 7  # rank and six tensors
    assert page.count("<img") == 7  # six of its own, and one beside the second run
    assert "http" not in page.replace("http-equiv", "")
    assert "elpd_loo" in page
    assert "cannot be shown together" in page  # lora has no gates
    assert (tmp_path / "lora" / "report.html").read_text().count("<img") == 2


def test_a_folder_that_holds_no_run(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "holds no posterior.nc" in capsys.readouterr().err
    (tmp_path / "posterior.nc").write_text("not a netCDF file")
    assert main(["diagnose", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "cannot read" in error
    assert error.count("\n") == 1
    xr.Dataset({"x": 1}).to_netcdf(tmp_path / "posterior.nc", group="posterior")
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "is no whole bundle of this version" in capsys.readouterr().err
    assert main(["diagnose"]) == 2
    assert main(["diagnose", str(tmp_path), f"{tmp_path}/"]) == 2
    assert "a run is named twice" in capsys.readouterr().err
    assert main(["diagnose", str(tmp_path / "posterior.nc")]) == 2
    assert f"name the folder of the run, {tmp_path}" in capsys.readouterr().err
    assert main(["diagnose", str(tmp_path), "--format"]) == 2
    assert "unrecognized arguments: --format" in capsys.readouterr().err


def test_of_several_runs_all_are_written_or_none(made_bundle, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_bundle(tmp_path / name / "posterior.nc", made_bundle(RANK, BITS))
    (tmp_path / "b" / "report.html").mkdir()
    assert main(["diagnose", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    printed = capsys.readouterr()
    assert "report.html is a folder" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "a" / "diagnosis.json").exists()
    assert not (tmp_path / "b" / "diagnosis.json").exists()


def test_a_run_that_has_learned_nothing_says_so(made_bundle):
    """NLL of the labels' frequencies, 6 of 9: 0.6365 nats."""
    rank = RANK.clone()
    rank[:6] = -5.0
    bundle = made_bundle(rank, BITS)
    bundle.log_likelihood["label"][:] = -0.6
    run = diagnose(bundle)
    assert run["run"]["log_likelihood_gain"] == [pytest.approx(0.0365, abs=1e-4)]
    assert "NOTHING" not in text(run)
    assert "the data speak against any rank" in text(run)
    bundle.log_likelihood["label"][:] = -0.63
    said = text(diagnose(bundle))
    assert "NOTHING WAS LEARNED" in said
    assert "the data speak" not in said
    # alike, and so in one line
    assert said.count("rank 0 with probability") == 1
    assert "and 2 more: rank 0 with probability 0.99 to 0.99" in said
    both = combine([made_bundle(RANK, BITS), made_bundle(rank, BITS, seed=1)])
    both.log_likelihood["label"][1] = -0.7
    said = text(diagnose(both))
    assert "Chain 1 has learned nothing" in said
    assert "NOTHING" not in said


def test_gates_that_have_not_come_to_rest_are_told(made_bundle):
    bundle = made_bundle(RANK, BITS)
    stats = bundle.sample_stats
    phase = ["warmup"] * 10 + ["joint"] * 20 + ["settle"] * 5
    steps = np.arange(35)
    path = np.interp(steps, [10, 25, 29], [3.0, 1.0, 0.5])[None, :, None].repeat(12, -1)
    moving = xr.Dataset(
        {"phase": ("step", phase),
         "rank_trajectory": (("chain", "recorded_step", "layer"), path)},
        {"recorded_step": steps},
    )  # fmt: skip
    assert movement(moving) == {"rank": {"change": 0.5, "share": 1.0}}
    moving["phase"] = ("step", phase[:30] + ["refine"] * 5)
    assert movement(moving) == {}
    assert movement(stats)["rank"]["change"] == 0
    found = diagnose(bundle)
    assert "come to rest" not in text(found)
    found["run"]["movement"] = {"rank": {"change": 0.5, "share": 0.2}}
    assert "of a layer's rank by 0.50, more than 10% of its level: gates had not" in text(found)


def test_a_cold_posterior_shows_what_its_divergence_counts(made_bundle):
    bundle = made_bundle(RANK)
    bundle.attrs |= {"weight_temperature": 0.001, "weight_posterior": "normal"}
    found = diagnose(bundle)
    assert found["run"]["elbo_terms_nats"][0]["sum"] == pytest.approx(-58 - 20 - 0.003 - 5)
    assert "0.001 x kl_adapter_weights 3" in text(found)
    assert "weights are a point" not in text(found)


def test_odds_of_a_prior_that_never_drew_a_rank_are_a_bound(made_bundle):
    bundle = made_bundle(RANK)
    bundle.prior["rank"][:, :, 1] = 0
    assert "log odds of a rank above it beyond -6.0 a priori" in text(diagnose(bundle))
