"""Metrics against values worked out by hand or by another road than the code's."""

import math

import numpy as np
import pytest

from bayes_lora.inference.metrics import (
    COVERAGE_LEVELS,
    accuracy,
    brier,
    ece,
    evaluate_predictions,
    f1,
    matthews,
    nll,
    pearson,
    spearman,
)
from bayes_lora.inference.predictive import (
    ClassProbabilities,
    NormalPredictions,
    TextProbabilities,
)
from bayes_lora.inference.tasks import TASKS

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
PREDICTIONS = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])


def test_class_metrics_of_a_known_confusion_matrix():
    assert accuracy(PREDICTIONS, LABELS) == pytest.approx(7 / 10)
    assert f1(PREDICTIONS, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    expected = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert matthews(PREDICTIONS, LABELS) == pytest.approx(expected)


def test_f1_is_of_class_1():
    assert f1(1 - PREDICTIONS, 1 - LABELS) == pytest.approx(2 * 4 / (2 * 4 + 2 + 1))
    assert f1(np.zeros(4, int), np.zeros(4, int)) == 0


def test_correlations_of_few_numbers():
    x, y = np.array([1.0, 2.0, 4.0, 5.0]), np.array([2.0, 1.0, 3.0, 30.0])
    dx, dy = x - 3, y - 9
    assert pearson(x, y) == pytest.approx((dx @ dy) / math.sqrt((dx @ dx) * (dy @ dy)))
    # ranks 1 2 3 4 and 2 1 3 4: 1 - 6 sum d^2 / (n (n^2 - 1))
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert pearson(x, -y) == pytest.approx(-pearson(x, y))


def test_spearman_gives_ties_their_mean_rank():
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    ties, y = np.array([0.0, 7.0, 7.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(ties, y) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_constant_predictions_correlate_with_nothing():
    assert matthews(np.ones(10, int), LABELS) == 0
    assert pearson(np.full(3, 2.5), np.array([1.0, 2.0, 4.0])) == 0
    assert pearson(np.array([1.0, 2.0, 4.0]), np.full(3, 2.5)) == 0
    assert spearman(np.full(3, 2.5), np.array([1.0, 2.0, 4.0])) == 0


def test_nll_is_of_the_label_not_of_the_prediction():
    probabilities = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    expected = -(math.log(0.2) + math.log(0.8)) / 2
    assert nll(probabilities, np.array([0, 2])) == pytest.approx(expected)


def test_nll_of_a_certain_mistake_is_finite():
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5]], dtype=np.float32)
    expected = (126 * math.log(2) + math.log(2)) / 2  # the smallest normal float32 is 2^-126
    assert nll(probabilities, np.array([1, 1])) == pytest.approx(expected)


def test_brier_sums_over_classes_and_averages_over_examples():
    probabilities = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    expected = (0.8**2 + 0.5**2 + 0.3**2 + 0.1**2 + 0.1**2 + 0.2**2) / 2
    assert brier(probabilities, np.array([0, 2])) == pytest.approx(expected)
    assert brier(np.array([[0.0, 1.0]]), np.array([0])) == 2


def test_ece_weights_the_gaps_of_its_bins():
    confidence = np.array([0.62, 0.64, 0.66, 0.95, 0.97])
    probabilities = np.stack([1 - confidence, confidence], axis=1)
    labels = np.array([1, 0, 0, 1, 1])
    # bin (0.6, 0.667]: accuracy 1/3, confidence 0.64; bin (0.933, 1]: accuracy 1, confidence 0.96
    assert ece(probabilities, labels) == pytest.approx(3 / 5 * (0.64 - 1 / 3) + 2 / 5 * 0.04)


def test_ece_gaps_cancel_within_a_bin_and_not_between_bins():
    within = np.array([[0.61, 0.39], [0.39, 0.61], [0.61, 0.39]])
    assert ece(within, np.array([0, 1, 1])) == pytest.approx(2 / 3 - 0.61)
    between = np.array([[0.7, 0.3], [0.9, 0.1]])
    assert ece(between, np.array([0, 1])) == pytest.approx((0.3 + 0.9) / 2)


@pytest.mark.parametrize("other", [0.82, 0.72])
def test_ece_has_15_bins_closed_above(other):
    # 0.8 = 12/15 ends bin 12, which begins at 11/15 = 0.733; neither 0.82 nor 0.72 is in it
    probabilities = np.array([[0.8, 0.2], [other, 1 - other]])
    assert ece(probabilities, np.array([0, 1])) == pytest.approx((0.2 + other) / 2)


def test_ece_counts_confidence_one():
    assert ece(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1])) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("task", "own"),
    [
        ("cola", {"matthews": 10 / math.sqrt(600), "accuracy": 0.7}),
        ("mrpc", {"accuracy": 0.7, "f1": 6 / 9}),
        ("agreement", {"accuracy": 0.7}),
    ],
)
def test_a_classification_task_reports_its_own_metrics(task, own):
    probabilities = np.where(PREDICTIONS[:, None] == [0, 1], 0.75, 0.25)
    metrics = evaluate_predictions(TASKS[task], ClassProbabilities(probabilities), LABELS)
    assert list(metrics) == ["score", *own, "nll", "ece", "brier"]
    assert metrics["score"] == metrics[next(iter(own))]
    assert {name: metrics[name] for name in own} == pytest.approx(own)
    assert metrics["nll"] == pytest.approx(-0.7 * math.log(0.75) - 0.3 * math.log(0.25))
    assert metrics["ece"] == pytest.approx(0.05)
    assert metrics["brier"] == pytest.approx(2 * (0.7 * 0.25**2 + 0.3 * 0.75**2))


def test_a_regression_task_reports_its_own_metrics():
    mean, scale = np.array([1.0, 2.0, 4.0, 5.0]), np.array([0.5, 1.0, 2.0, 4.0])
    labels = np.array([2.0, 1.0, 3.0, 30.0])
    metrics = evaluate_predictions(TASKS["stsb"], NormalPredictions(mean, scale), labels)
    assert list(metrics) == ["score", "pearson", "spearman", "nll", "ece", "crps", "rmse"]
    assert metrics["score"] == (metrics["pearson"] + metrics["spearman"]) / 2
    assert metrics["spearman"] == pytest.approx(0.8)
    assert metrics["rmse"] == pytest.approx(math.sqrt((1 + 1 + 1 + 625) / 4))
    z2 = [4.0, 1.0, 0.25, 39.0625]
    log_scale = math.log(0.5 * 1 * 2 * 4) / 4
    expected = sum(z2) / 8 + log_scale + math.log(2 * math.pi) / 2
    assert metrics["nll"] == pytest.approx(expected)


def test_crps_is_the_integrated_squared_distance_of_distribution_functions():
    mean, scale, label = 1.5, 0.7, 0.4
    grid = np.linspace(mean - 12, mean + 12, 200_001)
    cdf = np.array([0.5 * (1 + math.erf((x - mean) / scale / math.sqrt(2))) for x in grid])
    expected = np.sum((cdf - (grid >= label)) ** 2) * (grid[1] - grid[0])
    metrics = evaluate_predictions(
        TASKS["stsb"], NormalPredictions(np.array([mean]), np.array([scale])), np.array([label])
    )
    assert metrics["crps"] == pytest.approx(expected, abs=1e-4)  # the grid's step is 1.2e-4


def test_coverage_error_of_labels_at_known_levels():
    # 0.6745 and 1.2816 standard deviations end the central intervals of level 0.5 and 0.8
    z = np.array([0.6744, -0.6744, 1.2815, -1.2815])
    metrics = evaluate_predictions(
        TASKS["stsb"], NormalPredictions(np.zeros(4), np.full(4, 3.0)), 3.0 * z + 0.0
    )
    coverage = np.where(COVERAGE_LEVELS < 0.499, 0, np.where(COVERAGE_LEVELS < 0.799, 0.5, 1))
    expected = np.mean(np.abs(coverage - COVERAGE_LEVELS))
    assert metrics["ece"] == pytest.approx(expected)


def test_coverage_error_vanishes_where_the_predictive_distribution_is_true():
    draws = np.random.default_rng(0).normal(size=20_000)
    true = evaluate_predictions(
        TASKS["stsb"], NormalPredictions(np.zeros(20_000), np.ones(20_000)), draws
    )
    # every coverage has a standard error of at most sqrt(1/4 / n)
    assert true["ece"] < 4 * math.sqrt(0.25 / 20_000)
    sure = evaluate_predictions(
        TASKS["stsb"], NormalPredictions(np.zeros(20_000), np.full(20_000, 0.5)), draws
    )
    assert sure["ece"] > 0.1


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"shapes differ: \(3, 1\)"):
        evaluate_predictions(
            TASKS["stsb"], NormalPredictions(np.zeros((3, 1)), np.ones((3, 1))), np.zeros(3)
        )


def test_perplexity_is_of_all_tokens_not_the_mean_of_the_texts():
    probabilities = [[0.5, 0.1], [0.25], [0.2, 0.5, 0.3]]  # of every token, text by text
    texts = TextProbabilities(np.array([sum(map(math.log, text)) for text in probabilities]))
    found = evaluate_predictions(TASKS["causal_lm"], texts, np.array([2, 1, 3]))
    product = math.prod(p for text in probabilities for p in text)
    assert found["perplexity"] == pytest.approx(product ** (-1 / 6))
    assert found["nll"] == -found["score"] == pytest.approx(-math.log(product) / 6)
