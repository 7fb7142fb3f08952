r"""Metrics of predictions: GLUE's own, and proper scores that judge the predictive distribution.

Classification, with :math:`p_{nk}` the probability of class :math:`k` for example :math:`n` of
:math:`N`, and :math:`y_n` its label (`nll`, `brier` and `ece` of Guo et al. 2017):

.. math::
    \text{nll} &= -\tfrac1N \sum_n \log p_{n y_n} \\
    \text{brier} &= \tfrac1N \sum_n \sum_k (p_{nk} - [k = y_n])^2 \\
    \text{ece} &= \sum_b \tfrac{N_b}{N} \lvert \text{accuracy}_b - \text{confidence}_b \rvert

Regression, with the predictive distribution :math:`N(\mu_n, \sigma_n^2)`,
:math:`z_n = (y_n - \mu_n) / \sigma_n`, and the central intervals of level :math:`l`:

.. math::
    \text{nll} &= \tfrac1N \sum_n \tfrac12 z_n^2 + \log \sigma_n + \tfrac12 \log 2\pi \\
    \text{crps} &= \tfrac1N \sum_n \sigma_n
        \bigl(z_n (2\Phi(z_n) - 1) + 2\varphi(z_n) - 1/\sqrt\pi\bigr) \\
    \text{ece} &= \tfrac1L \sum_l \lvert \text{coverage}_l - l \rvert

Language models, with :math:`T_n` predicted tokens in text :math:`n`:

.. math::
    \text{nll} = -\frac{\sum_n \log p(\text{text}_n)}{\sum_n T_n},
    \qquad \text{perplexity} = e^{\text{nll}}

These are better when lower. Logarithms are natural: nats per example, or per token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from bayes_lora.inference.predictive import (
    ClassProbabilities,
    FloatArray,
    NormalPredictions,
    Prediction,
    TextProbabilities,
)
from bayes_lora.inference.tasks import Task

IntArray = NDArray[np.integer]

LEAST_GAIN = 0.01
"""Nats an example by which a network that has learned something predicts better than the labels'
frequencies do."""

ECE_BINS = 15
"""Equal-width bins of confidence, as in Guo et al. (2017)."""

COVERAGE_LEVELS = np.arange(1, 20) / 20
"""Nominal levels of the central intervals whose coverage is checked: 0.05, 0.10, ..., 0.95."""


def constant_nll(labels: NDArray[np.number], is_regression: bool) -> float:
    """NLL of the best prediction that looks at no example, nats per example.

    It is the entropy of the classes' frequencies, or of the normal distribution with the mean and
    the standard deviation of the labels.

    Examples
    --------
    >>> round(constant_nll(np.array([0, 1, 1, 1]), is_regression=False), 4)
    0.5623
    """
    if is_regression:
        return float(stats.norm.entropy(labels.mean(), labels.std()))
    return float(stats.entropy(np.unique_counts(labels).counts))


def accuracy(predictions: IntArray, labels: IntArray) -> float:
    """Share of the labels that were predicted.

    Examples
    --------
    >>> accuracy(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    0.75
    """
    return float(np.mean(predictions == labels))


def f1(predictions: IntArray, labels: IntArray) -> float:
    """F1 of class 1 against class 0, ``2 TP / (2 TP + FP + FN)``; 0 where that is 0 / 0.

    Examples
    --------
    >>> f1(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    0.8
    """
    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews(predictions: IntArray, labels: IntArray) -> float:
    """Matthews correlation (Matthews 1975; for more classes Gorodkin 2004), in [-1, 1].

    It is 0 where predictions or labels are constant: a constant covaries with nothing.

    Examples
    --------
    >>> matthews(np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0]))
    0.0
    """
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: FloatArray, labels: FloatArray) -> float:
    """Pearson correlation, in [-1, 1].

    It is 0, not undefined, where predictions or labels are constant: who says the same of every
    example has told none apart, and a score that is no number could not be compared.

    Examples
    --------
    >>> round(pearson(np.array([1.0, 2.0, 4.0]), np.array([3.0, 5.0, 9.0])), 6)
    1.0
    """
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(stats.pearsonr(predictions, labels).statistic)


def spearman(predictions: FloatArray, labels: FloatArray) -> float:
    """Spearman correlation: `pearson` of the ranks, ties at their mean rank.

    Examples
    --------
    >>> round(spearman(np.array([1.0, 2.0, 4.0]), np.array([1.0, 10.0, 100.0])), 6)
    1.0
    """
    return pearson(stats.rankdata(predictions), stats.rankdata(labels))


METRICS: dict[str, Callable[..., float]] = {
    metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)
}
"""GLUE's metrics, by the names that `Task.metrics` uses."""


def nll(probabilities: FloatArray, labels: IntArray) -> float:
    """Negative log likelihood of the labels, in nats per example.

    A probability below `predictive.SMALLEST_PROBABILITY` counts as that, so that one confident
    mistake, which float32 rounds to 0, leaves the mean finite.

    Parameters
    ----------
    probabilities : ndarray of float
        Shape (examples, classes); rows sum to 1.
    labels : ndarray of int
        Shape (examples,); class ids.

    Examples
    --------
    >>> round(nll(np.array([[0.5, 0.5], [0.75, 0.25]]), np.array([0, 1])), 4)
    1.0397
    """
    return float(-np.mean(ClassProbabilities(probabilities).log_likelihood(labels)))


def brier(probabilities: FloatArray, labels: IntArray) -> float:
    """Brier score: squared distance of the probabilities from the one-hot label, in [0, 2].

    Summed over all classes as in Brier (1950), which for two classes is twice the form of class 1
    alone. Shapes are those of `nll`.

    Examples
    --------
    >>> round(brier(np.array([[0.7, 0.2, 0.1]]), np.array([0])), 4)
    0.14
    """
    one_hot = np.eye(probabilities.shape[1])[labels]
    return float(np.mean(np.sum((probabilities - one_hot) ** 2, axis=1)))


def ece(probabilities: FloatArray, labels: IntArray) -> float:
    """Expected calibration error of the top class (Guo et al. 2017, arXiv 1706.04599), in [0, 1].

    Confidence is the highest probability of an example, bins of it are ((b - 1) / 15, b / 15];
    the gap between a bin's accuracy and its mean confidence is weighted by its share of the
    examples. Shapes are those of `nll`.

    Examples
    --------
    >>> round(ece(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]), np.array([0, 1, 1])), 4)
    0.4
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    gaps = np.bincount(np.ceil(confidence * ECE_BINS).astype(int), weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(labels))


def coverage(mean: FloatArray, scale: FloatArray, labels: FloatArray) -> FloatArray:
    """Share of the labels inside the central normal interval of every level of `COVERAGE_LEVELS`.

    Examples
    --------
    >>> coverage(np.zeros(2), np.ones(2), np.array([0.1, 3.0]))[[0, 1, -1]].tolist()
    [0.0, 0.5, 0.5]
    """
    level = np.abs(2 * stats.norm.cdf((labels - mean) / scale) - 1)
    return np.asarray(np.mean(level[:, None] <= COVERAGE_LEVELS, axis=0))


def evaluate_predictions(
    task: Task, prediction: Prediction, labels: NDArray[np.number]
) -> dict[str, float]:
    """All metrics of a task, from the predictive distribution of every example.

    Parameters
    ----------
    task : Task
        Says which metrics are its own.
    prediction : Prediction
        At one setting of the latents, or averaged: without an axis for draws.
    labels : ndarray of int or float
        Shape (examples,); class ids, numbers, or of texts how many tokens of each are predicted.

    Returns
    -------
    dict of str to float
        ``score``, the headline: the first of `Task.metrics` (for MRPC and QQP accuracy, where
        GLUE averages it with F1), of a regression their mean (GLUE's for STS-B). Then the task's
        metrics; ``nll`` in nats per example; ``ece``; and ``brier``. A regression has ``crps``
        (Gneiting and Raftery 2007, eq. 21) and ``rmse`` in place of ``brier``, both in the unit
        of the labels; its ``nll`` is of a density, can be negative and depends on the unit; its
        ``ece`` is over `COVERAGE_LEVELS`, after Kuleshov et al. (2018, arXiv 1807.00263). A
        language model has ``nll`` in nats per token, ``perplexity``, and ``score`` for minus the
        ``nll``.

    Raises
    ------
    ValueError
        If the shapes of a regression differ: (n, 1) and (n,) would broadcast to all pairs.

    Examples
    --------
    >>> from bayes_lora.inference.predictive import ClassProbabilities
    >>> from bayes_lora.inference.tasks import TASKS
    >>> p, y = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 1])
    >>> evaluate_predictions(TASKS["cola"], ClassProbabilities(p), y)["matthews"]
    1.0
    """
    if isinstance(prediction, NormalPredictions):
        return _evaluate_regression(task, *prediction, labels)
    if isinstance(prediction, TextProbabilities):
        per_token = -float(prediction.log_probability.sum(dtype=np.float64) / labels.sum())
        return {"score": -per_token, "perplexity": float(np.exp(per_token)), "nll": per_token}
    probability, ids = prediction.probability, labels.astype(np.intp)
    own = {name: METRICS[name](probability.argmax(axis=1), ids) for name in task.metrics}
    proper = {metric.__name__: metric(probability, ids) for metric in (nll, ece, brier)}
    return {"score": own[task.metrics[0]], **own, **proper}


def _evaluate_regression(
    task: Task, mean: FloatArray, scale: FloatArray, labels: NDArray[np.number]
) -> dict[str, float]:
    if not mean.shape == scale.shape == labels.shape:
        raise ValueError(f"shapes differ: {mean.shape}, {scale.shape}, {labels.shape}")
    mean, scale, labels = (array.astype(np.float64) for array in (mean, scale, labels))
    own = {name: METRICS[name](mean, labels) for name in task.metrics}
    z = (labels - mean) / scale
    central = 2 * stats.norm.cdf(z) - 1  # its size is the level of the interval the label ends
    crps = scale * (z * central + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    return {
        "score": float(np.mean(list(own.values()))),
        **own,
        "nll": float(-np.mean(stats.norm.logpdf(labels, mean, scale))),
        "ece": float(np.mean(np.abs(coverage(mean, scale, labels) - COVERAGE_LEVELS))),
        "crps": float(np.mean(crps)),
        "rmse": float(np.sqrt(np.mean((labels - mean) ** 2))),
    }
