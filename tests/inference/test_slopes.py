"""What opening a gate adds, from draws that see a part of the data each."""

from itertools import cycle
from statistics import fmean

import pytest
import torch
from torch.nn.functional import softplus

from bayes_lora.gates import nested, rank_probabilities
from bayes_lora.inference.natural_gradient import GateSet, ascend
from bayes_lora.inference.slopes import FORGOTTEN, KEPT, TRUSTED, Slopes

PARTS = 5


def take_in(slopes, part, gates, gradient, middle=(0.0, 0.0), whole=True):
    gates, gradient, middle = (torch.tensor(x).double() for x in (gates, gradient, middle))
    slopes.add(part, whole, gates, gradient, middle, torch.ones(2).double())


def test_after_one_pass_the_whole_data_set_is_summed_whatever_the_gates_were():
    slopes = Slopes(torch.zeros(2).double(), PARTS, (1, 1))
    for part in range(PARTS):
        take_in(slopes, part, [part % 2, 1], [10.0**part, 3.0])
    # two parts saw the first gate closed, three open, and none both: no difference is told
    assert slopes.integrals().tolist() == [11111.0, 15.0]


def test_before_it_the_parts_that_were_seen_stand_for_all():
    slopes = Slopes(torch.zeros(2).double(), PARTS, (1, 1))
    for part, gradient in ((0, 1.0), (3, 5.0)):
        take_in(slopes, part, [1, 1], [gradient, 0.0])
    assert slopes.integrals().tolist() == [15.0, 0.0]


def test_an_end_not_seen_follows_from_parts_that_saw_both_shrunk_as_they_are_few():
    slopes = Slopes(torch.zeros(2).double(), PARTS, (1, 1))
    ends = {0: (2.0, 5.0), 1: (3.0, 8.0)}  # differences 3 and 5
    for part in range(PARTS):
        take_in(slopes, part, [1, 1], [ends.get(part, (0.0, 7.0))[1], 1.0])
    for part, (closed, _) in ends.items():
        take_in(slopes, part, [0, 1], [closed, 1.0])
    difference = 4 * 2 / (2 + TRUSTED * (1 - 2 / PARTS))
    expected = (2 + 5) / 2 + (3 + 8) / 2 + 3 * (7 - difference / 2)
    assert slopes.integrals().tolist() == pytest.approx([expected, 5.0])


def test_a_middle_seen_in_all_parts_makes_it_simpsons_rule():
    """Derivatives of z^3 times 1 to 5: at 0, 1/2 and 1 they are 0, 3/4 and 3."""
    slopes = Slopes(torch.zeros(2).double(), PARTS, (100, 100))
    for part in range(PARTS):
        for whole in (True, False):
            for z in (0, 1):
                take_in(slopes, part, [z, 1], [3.0 * z * (part + 1), 1.0], whole=whole)
        take_in(slopes, part, [0, 1], [0.75 * (part + 1), 1.0], middle=(1.0, 0.0), whole=False)
    assert slopes.integrals().tolist() == pytest.approx([15.0, 5.0])


def test_means_look_back_on_a_window():
    slopes = Slopes(torch.zeros(2).double(), 1, (1, 1))
    for z, gradient in ((0, 4.0), (1, 1.0), (1, 1.0), (1, 9.0)):
        take_in(slopes, 0, [z, 1], [gradient, 0.0])
    # open: 1, 1 and 9, of weights that halve from draw to draw (the first two are a plain mean)
    expected = (4.0 + (1 / 8 + 1 / 4 + 9 / 2) / (1 / 8 + 1 / 4 + 1 / 2)) / 2
    assert slopes.integrals()[0].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("draws", "expected"), [(FORGOTTEN * KEPT, 2.5), (FORGOTTEN * KEPT + 1, 1.0)]
)
def test_an_end_not_seen_for_long_no_longer_counts(draws, expected):
    slopes = Slopes(torch.zeros(2).double(), 1, (KEPT, KEPT))
    take_in(slopes, 0, [0, 1], [4.0, 0.0])
    for _ in range(draws):
        take_in(slopes, 0, [1, 1], [1.0, 0.0])
    assert slopes.integrals()[0].item() == pytest.approx(expected)


def refined(score, y, weights, size, passes, every_batch_is_all):
    """Distance of the rank's distribution from the exact one, after draws that see a batch."""
    columns = score.split(size), y.split(size)
    batches = cycle(zip(*columns, strict=True))

    def log_likelihood(gates, x=score, y=y):
        found = (nested(gates) * weights) @ x.T
        return (y * found - softplus(found)).sum(-1)

    scale = len(columns[0]) if every_batch_is_all else 1
    gates = GateSet(torch.full((6,), 4.0).double(), torch.zeros(6).double(), bends=False)
    ascend(
        lambda z: scale * log_likelihood(z, *next(batches)), lambda p: None, [gates],
        iterations=passes * len(columns[0]) // 4, parts=len(columns[0]) // scale,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ranks = (torch.arange(6) < torch.arange(7)[:, None]).double()
    prior = rank_probabilities(gates.prior_logits.sigmoid())
    exact = torch.softmax(log_likelihood(ranks) + prior.log(), -1)
    return 0.5 * float((rank_probabilities(gates.logits.sigmoid()) - exact).abs().sum())


def test_refinement_by_parts_finds_the_exact_posterior_where_scaled_batches_do_not():
    by_parts, scaled = [], []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.tensor([0.6, 0.4, 0.3, 0.2, 0.1, 0.05]).double()
        x = torch.randn(800, 6, generator=generator).double()
        y = torch.bernoulli((x @ weights).sigmoid(), generator=generator)
        by_parts.append(refined(x, y, weights, 8, 12, every_batch_is_all=False))
        scaled.append(refined(x, y, weights, 8, 12, every_batch_is_all=True))
    assert fmean(by_parts) <= 0.06
    assert fmean(scaled) > 2 * fmean(by_parts)
