r"""Metrics of predictions: GLUE's own, and proper scores that judge the predictive distribution.

With :math:`p_{nk}` the probability of class :math:`k` for example :math:`n` of :math:`N`, and
:math:`y_n` its label:

.. math::
    \text{nll} &= -\tfrac1N \sum_n \log p_{n y_n} \\
    \text{brier} &= \tfrac1N \sum_n \sum_k (p_{nk} - [k = y_n])^2 \\
    \text{ece} &= \sum_b \tfrac{N_b}{N} \lvert \text{accuracy}_b - \text{confidence}_b \rvert

Regression has the predictive normal distribution :math:`N(\mu_n, \sigma_n^2)`, and with
:math:`z_n = (y_n - \mu_n) / \sigma_n`:

.. math::
    \text{nll} &= \tfrac1N \sum_n \tfrac12 z_n^2 + \log \sigma_n + \tfrac12 \log 2\pi \\
    \text{crps} &= \tfrac1N \sum_n \sigma_n
        \bigl(z_n (2\Phi(z_n) - 1) + 2\varphi(z_n) - 1/\sqrt\pi\bigr) \\
    \text{ece} &= \tfrac1L \sum_l \lvert \text{coverage}_l - l \rvert

All are better when lower, save GLUE's. Logarithms are natural: nats, per example.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from bayes_lora.inference.data import Task

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]

SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)
"""Probabilities are clipped here before the logarithm: one mistake costs at most 87.3 nats."""

ECE_BINS = 15
"""Equal-width bins of confidence, as in Guo et al. (2017)."""

COVERAGE_LEVELS = np.arange(1, 20) / 20
"""Nominal levels of the central intervals whose coverage is checked: 0.05, 0.10, ..., 0.95."""


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
    """Matthews correlation of two classes or more (Matthews 1975; Gorodkin 2004), in [-1, 1].

    It is 0 where predictions or labels are constant: a constant does not covary with anything.

    Examples
    --------
    >>> matthews(np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0]))
    0.0
    """
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: FloatArray, labels: FloatArray) -> float:
    """Pearson correlation, in [-1, 1].

    It is 0, not undefined, where predictions or labels are constant: a model that gives every
    example the same number has not ranked any, and its score should say so and stay a number.

    Examples
    --------
    >>> round(pearson(np.array([1.0, 2.0, 4.0]), np.array([3.0, 5.0, 9.0])), 6)
    1.0
    """
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(stats.pearsonr(predictions, labels).statistic)


def spearman(predictions: FloatArray, labels: FloatArray) -> float:
    """Spearman correlation: `pearson` of the ranks, ties at their mean rank; 0 for a constant.

    Examples
    --------
    >>> round(spearman(np.array([1.0, 2.0, 4.0]), np.array([1.0, 10.0, 100.0])), 6)
    1.0
    """
    return pearson(stats.rankdata(predictions), stats.rankdata(labels))


METRICS: dict[str, Callable[..., float]] = {
    metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)
}
"""GLUE's metrics by the names that `Task.metrics` uses."""


def nll(probabilities: FloatArray, labels: IntArray) -> float:
    """Negative log likelihood of the labels, in nats per example.

    A probability below `SMALLEST_PROBABILITY` counts as that, so that one certain mistake (which
    float32 rounds to 0) leaves the mean finite.

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
    likelihood = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.mean(np.log(np.maximum(likelihood, SMALLEST_PROBABILITY))))


def brier(probabilities: FloatArray, labels: IntArray) -> float:
    """Brier score: squared distance of the probabilities from the one-hot label, in [0, 2].

    Summed over all classes as in Brier (1950); for two classes it is twice the one-class form.
    Shapes are those of `nll`.

    Examples
    --------
    >>> round(brier(np.array([[0.7, 0.2, 0.1]]), np.array([0])), 4)
    0.14
    """
    one_hot = np.eye(probabilities.shape[1])[labels]
    return float(np.mean(np.sum((probabilities - one_hot) ** 2, axis=1)))


def ece(probabilities: FloatArray, labels: IntArray) -> float:
    """Expected calibration error of the top class, in [0, 1].

    Confidence is the highest probability of an example. Examples are put into `ECE_BINS` bins
    ((b - 1) / 15, b / 15] of confidence; the gaps between a bin's accuracy and its mean confidence
    are averaged, weighted by the bin's share of examples (Guo et al. 2017, arXiv 1706.04599).
    Shapes are those of `nll`.

    Examples
    --------
    >>> round(ece(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]), np.array([0, 1, 1])), 4)
    0.4
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.ceil(confidence * ECE_BINS).astype(int)
    gaps = np.bincount(bins, weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(labels))


def evaluate_predictions(
    task: Task, probabilities: FloatArray, labels: IntArray
) -> dict[str, float]:
    """All metrics of a classification task.

    Parameters
    ----------
    task : Task
        Says which metrics are the task's own.
    probabilities : ndarray of float
        Shape (examples, classes); rows sum to 1.
    labels : ndarray of int
        Shape (examples,); class ids.

    Returns
    -------
    dict of str to float
        ``score``, the number that GLUE's leaderboard is about, here the first of `Task.metrics`
        (for MRPC and QQP accuracy, where GLUE averages it with F1); then the task's metrics,
        ``nll`` (nats per example), ``ece`` and ``brier``.

    Examples
    --------
    >>> from bayes_lora.inference.data import TASKS
    >>> evaluate_predictions(TASKS["cola"], np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([0, 1]))
    {'score': 1.0, 'matthews': 1.0, 'nll': 0.34657359027997264, 'ece': 0.25, 'brier': 0.25}
    """
    own = {name: METRICS[name](probabilities.argmax(axis=1), labels) for name in task.metrics}
    proper = {metric.__name__: metric(probabilities, labels) for metric in (nll, ece, brier)}
    return {"score": own[task.metrics[0]], **own, **proper}


def evaluate_regression(
    task: Task, mean: FloatArray, scale: FloatArray, labels: FloatArray
) -> dict[str, float]:
    """All metrics of a regression task with a normal predictive distribution.

    Parameters
    ----------
    task : Task
        Says which metrics are the task's own.
    mean, scale : ndarray of float
        Shape (examples,); mean and standard deviation (> 0) in the unit of the labels.
    labels : ndarray of float
        Shape (examples,).

    Returns
    -------
    dict of str to float
        ``score``, the mean of the task's own metrics (for STS-B GLUE's mean of Pearson and
        Spearman); these metrics; ``nll`` of the density (nats per example; it can be negative and
        depends on the unit); ``ece``, the mean absolute difference between the coverage of the
        central predictive intervals and their nominal level over `COVERAGE_LEVELS`, after
        Kuleshov et al. (2018, arXiv 1807.00263); ``crps`` (Gneiting and Raftery 2007, eq. 21) and
        ``rmse``, both in the unit of the labels.

    Raises
    ------
    ValueError
        If the shapes differ: (n, 1) against (n,) would broadcast to all pairs.

    Examples
    --------
    >>> from bayes_lora.inference.data import TASKS
    >>> mean, scale = np.array([1.0, 2.0, 3.0]), np.ones(3)
    >>> round(evaluate_regression(TASKS["stsb"], mean, scale, mean + 1.0)["nll"], 4)
    1.4189
    """
    if not mean.shape == scale.shape == labels.shape:
        raise ValueError(f"shapes differ: {mean.shape}, {scale.shape}, {labels.shape}")
    mean, scale, labels = (np.asarray(a, dtype=np.float64) for a in (mean, scale, labels))
    own = {name: METRICS[name](mean, labels) for name in task.metrics}
    z = (labels - mean) / scale
    central = np.abs(2 * stats.norm.cdf(z) - 1)  # the level of the interval that ends at the label
    coverage = np.mean(central[:, None] <= COVERAGE_LEVELS, axis=0)
    crps = scale * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    return {
        "score": float(np.mean(list(own.values()))),
        **own,
        "nll": float(-np.mean(stats.norm.logpdf(labels, mean, scale))),
        "ece": float(np.mean(np.abs(coverage - COVERAGE_LEVELS))),
        "crps": float(np.mean(crps)),
        "rmse": float(np.sqrt(np.mean((labels - mean) ** 2))),
    }
