"""The page of priors, and the options that change one number of it."""

import json
from dataclasses import replace

from bayes_lora.inference import assemble
from bayes_lora.inference.config import parse
from bayes_lora.models.priors import NORMAL_WEIGHTS, GibbsGates, Priors


def test_a_price_leaves_the_rest_of_the_page_alone(monkeypatch):
    page = GibbsGates(price=500.0, budget=0.1, rank_logits=-2.0)
    monkeypatch.setattr(assemble, "Priors", lambda: Priors(gates=replace(page)))
    config = parse(["--output_dir", "x", "--price", "700"])
    assert assemble.configured_priors(config).gates == replace(page, price=700.0, budget=None)
    config = parse(["--output_dir", "x", "--target_bops", "0.2"])
    assert assemble.configured_priors(config).gates == replace(page, budget=0.2)


def test_the_page_of_priors_is_what_the_command_uses(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Priors.__init__, "__defaults__", (0.5, *Priors.__init__.__defaults__[1:]))
    assert command(epochs=1, method="r")[0] == 0
    assert command(epochs=1, method="r", weight_prior_scale=1, output_dir=tmp_path / "b")[0] == 0
    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text())["kl_adapter_weights"]
        for name in ("run", "b")
    )
    assert first < second - 1  # log 0.5 a weight, and a little for their size


def test_a_normal_posterior_has_a_prior_of_its_own_unless_told_otherwise():
    normal = ["--output_dir", "x", "--weight_posterior", "normal"]
    found = assemble.configured_priors(parse(normal))
    assert vars(found) == vars(Priors()) | NORMAL_WEIGHTS | {"gates": found.gates}
    told = assemble.configured_priors(parse([*normal, "--weight_temperature", "0.5"]))
    assert told.adapter_weight_temperature == 0.5
    assert told.adapter_weight_scale == NORMAL_WEIGHTS["adapter_weight_scale"]
    assert assemble.configured_priors(parse(normal[:2])).adapter_weight_temperature == 1.0
