"""Pictures: what they show is what the bundle holds."""

import numpy as np
import pytest
import torch

from bayes_lora.inference.bundle import read_bundle
from bayes_lora.inference.heat_maps import (
    plot_bits,
    plot_rank,
    plot_rank_and_bits,
    plot_two_runs,
)
from bayes_lora.inference.plots import (
    PLOTS,
    plot_elbo_terms,
    plot_gate_trajectories,
    plot_prior_and_posterior,
    plot_reliability,
)
from bayes_lora.targets import LayerSpec

HALF = torch.zeros(12, 3)
QUARTER = torch.full((12, 6, 3), -np.log(3.0))


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def cells(figure):
    return [[t.get_text() for t in axes.texts] for axes in figure.axes if axes.get_title()]


def test_heat_maps_have_one_panel_a_quantity_and_one_cell_a_layer(made_bundle):
    found = made_bundle(HALF, QUARTER)
    figure = plot_rank_and_bits(found)
    assert titles(figure) == ["rank (of 3)", "bits of weight", "bits of input"]
    expected = (0.5 + 0.25 + 0.125, *(1.5 + 0.75 + 0.375 + 0.25,) * 2)
    for texts, mean in zip(cells(figure), expected, strict=True):
        assert len(texts) == 12
        assert all(text.startswith(f"{mean:.1f}\n±") for text in texts)
    assert titles(plot_rank(found)) == ["rank (of 3)"]
    assert len(titles(plot_bits(found))) == 6


def test_what_there_is_not_is_not_shown(made_bundle):
    without_bits = made_bundle(HALF)
    assert titles(plot_rank_and_bits(without_bits)) == ["rank (of 3)"]
    for plot in (plot_bits, plot_rank):
        with pytest.raises(ValueError, match="nothing to show"):
            plot(made_bundle(None, QUARTER) if plot is plot_rank else without_bits)
    for plot in (plot_rank_and_bits, plot_gate_trajectories, plot_prior_and_posterior):
        with pytest.raises(ValueError, match="nothing to show"):
            plot(made_bundle())


def test_blocks_are_named_in_full_where_their_numbers_repeat(made_bundle, network):
    paths = [f"{part}.block.{i}.layer.{j}.q" for part in ("encoder", "decoder") for i in (0, 1)
             for j in (0, 1, 2)]  # fmt: skip
    paths[-1] = "projections.0"
    network.specs = [LayerSpec(path, 4, 4) for path in paths]
    assert [(spec.block, spec.kind) for spec in network.specs[-2:]] == [
        ("decoder.block.1", "layer.1.q"),
        ("projections.0", ""),
    ]
    figure = plot_rank(made_bundle(HALF))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1",
                     "projections.0"]  # fmt: skip
    assert len({text.get_position() for text in figure.axes[0].texts}) == 12


def test_prior_and_posterior_are_probabilities(made_bundle):
    figure = plot_prior_and_posterior(made_bundle(HALF, QUARTER))
    assert len(titles(figure)) == len(figure.axes) == 7
    for axes in figure.axes:
        if axes.get_title():
            for bars in axes.containers:
                assert sum(bar.get_height() for bar in bars) == pytest.approx(1)


def test_two_runs_side_by_side(made_bundle):
    first, second = made_bundle(HALF, QUARTER), made_bundle(HALF + 9, QUARTER, seed=1)
    figure = plot_two_runs(first, second, ("a", "b"))
    shown = dict(zip(titles(figure), cells(figure), strict=True))
    assert list(shown)[:3] == ["rank (of 3)\na", "rank (of 3)\nb", "rank\nb\nless a"]
    assert {text.split("\n")[0] for text in shown["rank\nb\nless a"]} == {"2.1"}
    only_bits = made_bundle(None, QUARTER, seed=2)
    common = titles(plot_two_runs(first, only_bits, ("a", "c")))
    assert [title for title in common if title.endswith("c")] == [
        "bits of weight\nc", "bits of input\nc",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no gates in common"):
        plot_two_runs(made_bundle(HALF, seed=3), only_bits, ("d", "c"))


def test_pictures_of_a_run(command, tmp_path):
    code, _, err = command()
    assert code == 0, err
    found = read_bundle(tmp_path / "run" / "posterior.nc")
    for plot in PLOTS.values():
        plot(found).savefig(tmp_path / "picture.png")
    phases = {"warmup", "anneal", "joint", "settle"}
    for axes in (*plot_elbo_terms(found).axes, *plot_gate_trajectories(found).axes):
        assert phases == {text.get_text() for text in axes.texts}


def test_a_regression_has_a_reliability_diagram_too(command, tmp_path, inputs):
    code, _, err = command(
        train_file=inputs / "train_scores.jsonl", validation_file=inputs / "validation_scores.jsonl"
    )
    assert code == 0, err
    figure = plot_reliability(read_bundle(tmp_path / "run" / "posterior.nc"))
    assert figure.axes[0].get_xlabel() == "level of the interval"
