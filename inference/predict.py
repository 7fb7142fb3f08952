"""Predict with a trained model: at one setting of gates and weights, or over draws of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bayes_lora.errors import NumericalError
from bayes_lora.inference import processes
from bayes_lora.inference.predictive import (
    ClassProbabilities,
    NormalPredictions,
    Prediction,
    TextProbabilities,
)
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.network import Latents
from bayes_lora.next_tokens import NextTokens


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
        Batches; `labels` are looked at only if they are texts, whose probability is asked for. Its
        sampler must give the same order twice.
    gates : Gates
        What to hold the gates at.
    adapter_weights : Tensor, optional
        Flat vector, shape (P,); default: the location of the posterior.

    Returns
    -------
    Prediction
        In the order of the data set, whatever that of the batches is.

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
        From the inputs of a batch, on `device`, to the distribution of its labels: categorical, of
        next tokens, or another that has a mean and a standard deviation.
    loader, device
        As of `predict`; where the inputs go.

    Returns
    -------
    Prediction
        As of `predict`.

    Raises
    ------
    NumericalError
        If a prediction is not finite.

    Notes
    -----
    Several processes share the batches, and each gets all predictions.
    """
    mine: list[Prediction] = []
    for batch in processes.share(loader):
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        distribution = distribution_of(inputs)
        if isinstance(distribution, torch.distributions.Categorical):
            mine.append(ClassProbabilities(distribution.probs.cpu().numpy()))
        elif isinstance(distribution, NextTokens):
            log_probability = distribution.log_prob(batch["labels"].to(device))
            mine.append(TextProbabilities(log_probability.cpu().numpy()))
        else:
            both = (distribution.mean, distribution.stddev)
            mine.append(NormalPredictions(*(part.cpu().numpy() for part in both)))
    everyone = processes.joined(mine)
    place = np.argsort(list(loader.sampler))
    found = [np.concatenate(parts)[place] for parts in zip(*everyone, strict=True)]
    if not all(np.isfinite(part).all() for part in found):
        raise NumericalError("predictions not finite; try a lower --learning_rate")
    return type(everyone[0])(*found)


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
    Prediction
        As of `predict`, with a first axis for the draws.
    """
    pairs = tqdm(
        zip(weights, gates, strict=True), desc="predict", unit="draw",
        disable=None if processes.is_main() else True,
    )  # fmt: skip
    return stacked([predict(model, guide, loader, held, drawn) for drawn, held in pairs])


def stacked(found: Sequence[Prediction]) -> Prediction:
    """Predictions at several draws as one, with a first axis for the draws."""
    return type(found[0])(*map(np.stack, zip(*found, strict=True)))
