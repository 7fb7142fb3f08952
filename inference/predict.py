"""Predictions of a trained model with its gates held at a decision."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader

from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.network import Latents


@torch.no_grad()
def predict(
    model: BayesianLoRA, guide: GateGuide, loader: DataLoader, gates: Gates
) -> tuple[np.ndarray, np.ndarray]:
    """Distribution of every label at fixed gates and the adapter weights' location.

    Parameters
    ----------
    model, guide : BayesianLoRA, GateGuide
        A trained pair.
    loader : DataLoader
        Batches; `labels` are not looked at.
    gates : Gates
        What to hold the gates at.

    Returns
    -------
    tuple of two ndarrays
        Classification: probabilities (examples, classes) and an empty array. Regression: means
        (examples,) and standard deviations (examples,).
    """
    was_training = model.training
    model.eval()
    device = guide.loc.device
    latents = Latents(guide.loc, *gates)
    first, second = [], []
    for batch in loader:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        distribution = model.likelihood(model.network(inputs, latents))
        if isinstance(distribution, torch.distributions.Categorical):
            first.append(distribution.probs)
        else:
            first.append(distribution.mean)
            second.append(distribution.stddev)
    model.train(was_training)
    return tuple(  # type: ignore[return-value]
        torch.cat(parts).cpu().numpy() if parts else np.empty(0) for parts in (first, second)
    )
