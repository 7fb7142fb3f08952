"""Predictive distributions of a trained model: at one setting of the gates, or over draws.

A prediction is a pair of arrays. Classification: probabilities (..., examples, classes) and an
empty array. Regression: means (..., examples) and standard deviations (..., examples).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bayes_lora.errors import NumericalError
from bayes_lora.inference import processes
from bayes_lora.inference.metrics import SMALLEST_PROBABILITY
from bayes_lora.inference.tasks import Task
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.network import Latents

FloatArray = NDArray[np.floating]
Prediction = tuple[FloatArray, FloatArray]


@torch.no_grad()
def predict(
    model: BayesianLoRA,
    guide: GateGuide,
    loader: DataLoader,
    gates: Gates,
    adapter_weights: Tensor | None = None,
) -> Prediction:
    """Distribution of every label at fixed gates and adapter weights.

    Parameters
    ----------
    model, guide : BayesianLoRA, GateGuide
        A trained pair.
    loader : DataLoader
        Batches; `labels` are not looked at. Its sampler must give the same order twice.
    gates : Gates
        What to hold the gates at.
    adapter_weights : Tensor, optional
        Flat vector, shape (P,); default: the location of the posterior.

    Returns
    -------
    tuple of two ndarrays
        Probabilities (examples, classes) and an empty array; or means and standard deviations,
        both (examples,). In the order of the data set, whatever that of the batches is.

    Raises
    ------
    NumericalError
        If a prediction is not finite.
    """
    was_training = model.training
    model.eval()
    device = guide.loc.device
    held = gates.map(lambda gate: gate.to(device))
    latents = Latents(guide.loc if adapter_weights is None else adapter_weights, *held)
    found = predictions(lambda x: model.likelihood(model.network(x, latents)), loader, device)
    model.train(was_training)
    return found


@torch.no_grad()
def predictions(
    distribution_of: Callable[[dict[str, Tensor]], Distribution],
    loader: DataLoader,
    device: torch.device,
) -> Prediction:
    """Distribution of every label, from a function of a batch of inputs.

    Parameters
    ----------
    distribution_of : function
        From the inputs of a batch, on `device`, to the distribution of its labels: categorical,
        or another that has a mean and a standard deviation.
    loader, device
        As of `predict`; where the inputs go.

    Returns
    -------
    tuple of two ndarrays
        As of `predict`.

    Raises
    ------
    NumericalError
        If a prediction is not finite.

    Notes
    -----
    Several processes share the batches, and each gets all predictions.
    """
    mine: list[tuple[Tensor, Tensor]] = []
    for batch in processes.share(loader):
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        distribution = distribution_of(inputs)
        if isinstance(distribution, torch.distributions.Categorical):
            mine.append((distribution.probs.cpu(), torch.empty(0)))
        else:
            mine.append((distribution.mean.cpu(), distribution.stddev.cpu()))
    place = torch.tensor(list(loader.sampler)).argsort()
    both = [torch.cat(parts) for parts in zip(*processes.joined(mine), strict=True)]
    found = [part[place] if len(part) else part for part in both]
    if not all(torch.isfinite(part).all() for part in found):
        raise NumericalError("predictions not finite; try a lower --learning_rate")
    return found[0].numpy(), found[1].numpy()


def predict_draws(
    model: BayesianLoRA,
    guide: GateGuide,
    loader: DataLoader,
    gates: Sequence[Gates],
    weights: Iterable[Tensor],
) -> Prediction:
    """Distribution of every label at every draw of gates and adapter weights.

    Parameters
    ----------
    model, guide, loader
        As in `predict`.
    gates : sequence of Gates
        S draws.
    weights : iterable of Tensor
        S draws of the flat vector, shape (P,) each.

    Returns
    -------
    tuple of two ndarrays
        As of `predict`, with a first axis for the draws.
    """
    pairs = tqdm(
        zip(weights, gates, strict=True), desc="predict", unit="draw",
        disable=None if processes.is_main() else True,
    )  # fmt: skip
    found = [predict(model, guide, loader, held, drawn) for drawn, held in pairs]
    first, second = zip(*found, strict=True)
    return np.stack(first), np.stack(second)


def averaged(prediction: Prediction) -> Prediction:
    """Average the predictive distributions of all draws into one.

    Probabilities are averaged; a mixture of normal distributions is given by its mean and its
    standard deviation, which is exact for all moments up to the second.

    Examples
    --------
    >>> mean, deviation = averaged((np.array([[0.0], [2.0]]), np.ones((2, 1))))
    >>> mean.tolist(), (deviation**2).round(6).tolist()
    ([1.0], [2.0])
    """
    first, second = prediction
    mean = first.mean(0)
    if not second.size:
        return mean, np.empty(0)
    return mean, np.sqrt((second**2).mean(0) + first.var(0))


def log_likelihood(prediction: Prediction, labels: NDArray[np.number]) -> FloatArray:
    """Log likelihood of every label at every draw, nats: shape (S, examples).

    Examples
    --------
    >>> log_likelihood((np.array([[[0.25, 0.75]]]), np.empty(0)), np.array([1])).round(4).tolist()
    [[-0.2877]]
    """
    first, second = prediction
    if second.size:
        return np.asarray(stats.norm.logpdf(labels, first, second))
    chosen = np.take_along_axis(first, labels.astype(int)[None, :, None], -1)[..., 0]
    return np.log(np.maximum(chosen.astype(np.float64), SMALLEST_PROBABILITY))


def draw_labels(prediction: Prediction, generator: np.random.Generator) -> NDArray[np.number]:
    """Draw a label for every example at every draw: shape (S, examples)."""
    first, second = prediction
    if second.size:
        return generator.normal(first, second)
    u = generator.random(first.shape[:-1])[..., None]
    return np.minimum((u > first.cumsum(-1)).sum(-1), first.shape[-1] - 1)


def described(task: Task, prediction: Prediction) -> dict[str, NDArray[Any]]:
    """Labels and uncertainties of predictions with a first axis for the draws.

    The entropy of the averaged probabilities p_s, in nats, is what the data leave open plus what
    the posterior leaves open; in regression, the variance is that of the noise and of the means:

        H(mean_s p_s) = mean_s H(p_s) + I,      I >= 0 the mutual information of label and latents.

    Examples
    --------
    >>> from bayes_lora.inference.tasks import TASKS
    >>> sure = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # two draws that contradict each other
    >>> found = described(TASKS["cola"], (sure, np.empty((2, 0))))
    >>> found["entropy"].round(3), found["entropy_data"].round(3)
    (array([0.693]), array([0.]))
    """
    mean, deviation = averaged(prediction)
    if task.is_regression:
        noise = (prediction[1] ** 2).mean(0)
        return {
            "label": mean, "variance": deviation**2, "variance_data": noise,
            "variance_posterior": (deviation**2 - noise).clip(0),
        }  # fmt: skip
    total, of_data = stats.entropy(mean, axis=-1), stats.entropy(prediction[0], axis=-1).mean(0)
    return {
        "label": np.array(task.label_names)[mean.argmax(-1)],
        "probability": mean.max(-1), "probabilities": mean, "entropy": total,
        "entropy_data": of_data, "entropy_posterior": (total - of_data).clip(0),
    }  # fmt: skip
