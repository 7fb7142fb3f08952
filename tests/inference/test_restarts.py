"""Restarts: chains with seeds and folders of their own, and what they predict together."""

import json

import numpy as np
import pytest

from bayes_lora.inference.bundle import read_bundle
from bayes_lora.inference.config import parse


def test_restarts_have_seeds_and_folders_of_their_own_and_become_chains(command, tmp_path):
    code, out, err = command(restarts=2, epochs=2, max_train_examples=80)
    assert code == 0, err
    inside = [parse(["--config", str(tmp_path / "run" / f"restart-{k}" / "config.yaml")]).training
              for k in (0, 1)]  # fmt: skip
    assert [(c.seed, c.data_seed) for c in inside] == [(0, 0), (1, 0)]
    whole = parse(["--config", str(tmp_path / "run" / "config.yaml")]).training
    assert (whole.restarts, whole.seed, whole.output_dir) == (2, 0, str(tmp_path / "run"))
    found = read_bundle(tmp_path / "run" / "posterior.nc")
    assert found.posterior.sizes["chain"] == 2
    inner = [json.loads((tmp_path / "run" / f"restart-{k}" / "metrics.json").read_text())
             for k in (0, 1)]  # fmt: skip
    means = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert means["nll"] == pytest.approx((inner[0]["nll"] + inner[1]["nll"]) / 2)
    assert inner[0]["nll"] != inner[1]["nll"]
    # but averaged is what all chains predict together
    p = found.predictions["probability"].to_numpy().mean((0, 1))
    y = found.predictions_constant_data["label"].to_numpy()
    assert means["averaged_nll"] == pytest.approx(-np.log(p[range(len(y)), y]).mean(), rel=1e-5)
    assert "nll" in out
    code, _, err = command(restarts=2, epochs=2)
    assert code == 2
    assert "--overwrite" in err
    # the first is the run without restarts
    assert command(epochs=2, max_train_examples=80, output_dir=tmp_path / "alone")[0] == 0
    first = tmp_path / "run" / "restart-0" / "history.csv"
    assert first.read_bytes() == (tmp_path / "alone" / "history.csv").read_bytes()
    # replaced by a run without restarts, nothing of them is left
    assert command(epochs=0.1, overwrite="true")[0] == 0
    assert not list((tmp_path / "run").glob("restart-*"))
