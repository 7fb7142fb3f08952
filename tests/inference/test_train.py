"""Phases, learning rates and the table, at hand-made values."""

import pytest
import torch

from bayes_lora.inference.phases import Phase, plan
from bayes_lora.inference.plots import plot_rank_and_bits
from bayes_lora.inference.table import rank_and_bits_table
from bayes_lora.inference.train import gate_learning_rate
from bayes_lora.models.model import Gates
from bayes_lora.targets import LayerSpec


@pytest.mark.parametrize("total", [1, 7, 93, 1000])
@pytest.mark.parametrize("shares", [(0.25, 0.2, 0.25), (0.0, 0.5, 0.5), (0.33, 0.33, 0.33)])
def test_phases_add_up_and_come_in_order(total, shares):
    phases = plan(total, shares, gated=True)
    assert sum(phase.steps for phase in phases) == total
    order = ["warmup", "anneal", "joint", "settle"]
    assert [p.name for p in phases] == [n for n in order if n in {p.name for p in phases}]
    assert all(phase.steps > 0 for phase in phases)


def test_plain_lora_differs_in_nothing_but_its_gates():
    gated, plain = (plan(40, (0.25, 0.25, 0.25), gated=g) for g in (True, False))
    assert [p.name for p in gated] == [p.name for p in plain]
    for ours, theirs in zip(gated, plain, strict=True):
        assert [ours.kl_weight(s) for s in range(10)] == [theirs.kl_weight(s) for s in range(10)]
    assert [p.gates for p in plain] == ["open", "open", "open", "decided"]


def test_kl_weight_rises_in_the_anneal_and_is_one_after():
    warmup, anneal, joint, _settle = plan(40, (0.25, 0.25, 0.25), gated=True)
    assert {warmup.kl_weight(step) for step in range(10)} == {0}
    assert [anneal.kl_weight(step) for step in range(10)] == pytest.approx(
        [0.1 * (step + 1) for step in range(10)]
    )
    assert {joint.kl_weight(step) for step in range(10)} == {1}


def test_gates_can_travel_from_open_to_closed_in_the_steps_they_have():
    rates = [gate_learning_rate([Phase("joint", "sampled", steps)]) for steps in (10, 300, 3000)]
    assert rates == [0.2, 0.1, 0.01]


def test_table_shows_decision_and_its_exact_probability(network):
    rank = torch.full((12, 3), 0.9)
    rank[0] = torch.tensor([0.8, 0.1, 0.5])
    bits = torch.full((12, 6, 3), 0.7)
    bits[0, 4] = torch.tensor([0.9, 0.2, 0.5])
    decided_rank = torch.ones(12, 3)
    decided_rank[0] = torch.tensor([1.0, 0.0, 0.0])
    decided_bits = torch.zeros(12, 6, 3)
    decided_bits[0, 4, 0] = 1
    table = rank_and_bits_table(network, Gates(rank, bits), Gates(decided_rank, decided_bits))
    row = next(line for line in table.splitlines() if line.startswith("0.attention.self.query"))
    # P(rank 1) = 0.8 * 0.9, mean 0.8 + 0.08 + 0.04; P(2 bits) = 0.3; P(4 bits) = 0.9 * 0.8
    assert row.split() == [
        "0.attention.self.query",
        *("1", "72%", "0.9"),
        *("2", "30%") * 4,
        *("4", "72%"),
        *("2", "30%"),
    ]


def test_picture_has_one_panel_a_quantity_and_one_cell_a_layer(network):
    half = Gates(torch.full((12, 3), 0.5), torch.full((12, 6, 3), 0.25))
    figure = plot_rank_and_bits(network, half)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [
        "rank (of 3)",
        "bits of weight",
        "bits of input",
    ]
    for axes, mean in zip(
        panels, (0.5 + 0.25 + 0.125, *(1.5 + 0.75 + 0.375 + 0.25,) * 2), strict=True
    ):
        texts = [text.get_text() for text in axes.texts]
        assert len(texts) == 12
        assert all(text.startswith(f"{mean:.1f}") for text in texts)
    with pytest.raises(ValueError, match="nothing to show"):
        plot_rank_and_bits(network, Gates())


def test_picture_names_blocks_in_full_where_their_numbers_repeat(network):
    paths = [f"{part}.block.{i}.layer.{j}.q" for part in ("encoder", "decoder") for i in (0, 1)
             for j in (0, 1)] + ["projections.0"]  # fmt: skip
    network.specs = [LayerSpec(path, 4, 4) for path in paths]
    assert [(spec.block, spec.kind) for spec in network.specs[-2:]] == [
        ("decoder.block.1", "layer.1.q"),
        ("projections.0", ""),
    ]
    figure = plot_rank_and_bits(network, Gates(torch.full((9, 3), 0.5)))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1",
                     "projections.0"]  # fmt: skip
    assert len({text.get_position() for text in figure.axes[0].texts}) == 9
