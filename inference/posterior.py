"""Draw from the posterior of a trained model, and from its prior, for the ArviZ bundle."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from bayes_lora.inference.batches import evaluation_batches
from bayes_lora.inference.bundle import Draws, InferenceData, bundle
from bayes_lora.inference.draws import (
    draw_posterior,
    draw_prior,
    draw_weights,
    log_probability,
    unbound,
)
from bayes_lora.inference.encoding import labels_of
from bayes_lora.inference.history import History
from bayes_lora.inference.predict import predict_draws
from bayes_lora.inference.predictive import Prediction
from bayes_lora.inference.tasks import Task
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates

POSTERIOR_DRAWS, PRIOR_DRAWS = 64, 200
"""Draws in a bundle; PSIS needs some 25 of the posterior at least."""

TRAINING_EXAMPLES = 128
"""Training examples whose log likelihood is kept; all of a larger set would take longer than
training. They are evenly spaced, the same in every run."""


def sample_posterior(
    model: BayesianLoRA,
    guide: GateGuide,
    task: Task,
    train: Dataset,
    validation: Dataset,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    history: History,
    draws: int,
    seed: int,
    save_weight_draws: bool = False,
) -> tuple[InferenceData, Prediction]:
    """Draw gates and weights from the guide, and what they predict.

    Parameters
    ----------
    model, guide : BayesianLoRA, GateGuide
        A trained pair.
    task : Task
        Its name, and those of its classes.
    train, validation : Dataset
        Tokenized, with `labels`.
    collate : function
        From a list of examples to a batch.
    history : History
        Of the training.
    draws : int
        Of the predictions; the first of those of the posterior, or more.
    seed : int
        Of all draws.
    save_weight_draws : bool
        Whether the bundle keeps the adapter weights too.

    Returns
    -------
    tuple of InferenceData and Prediction
        The bundle, and the predictive distributions of the validation set at all draws.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # adapter weights are drawn from a Pyro distribution
    kept = POSTERIOR_DRAWS
    everything = draw_posterior(guide, max(kept, draws), generator)
    held = unbound(everything, max(kept, draws))
    weights = [draw_weights(model, guide, each) for each in held]
    gates = everything.map(lambda gate: gate[:kept])
    index = np.linspace(0, len(train) - 1, min(TRAINING_EXAMPLES, len(train))).astype(int)
    chosen = train.select(index)
    # a model without anything random predicts the same at every draw
    varies = model.gated or guide.log_scale is not None

    def predictions(data: Dataset, size: int) -> Prediction:
        loader = evaluation_batches(data, collate)
        distinct = size if varies else 1
        found = predict_draws(model, guide, loader, held[:distinct], weights[:distinct])
        return type(found)(*(part.repeat(size // distinct, 0) for part in found))

    labels = labels_of(chosen)
    fitted, predicted = predictions(chosen, kept), predictions(validation, draws)
    of_labels = fitted.log_likelihood(labels)
    log_q = log_probability(gates, Gates(guide.rank_logits, guide.bit_logits), model)
    log_p = torch.as_tensor(of_labels.mean(-1) * len(train)) + log_prior(model, gates, kept)
    if guide.log_scale is not None:
        stacked = torch.stack(weights[:kept])
        used = None
        if gates.rank_gate is not None:  # where a gate is closed, both are the prior
            used = model.network.structure(gates.rank_gate).flatten(1)[:, guide.component.cpu()]
        log_q = log_q + _log_density(guide.adapter_weights(), stacked, used)
        log_p = log_p + _log_density(model.priors.adapter_weights(model.network), stacked, used)
    found = bundle(
        model.network,
        Draws(
            gates=gates,
            log_likelihood=of_labels,
            predicted_labels=fitted.draw_labels(np.random.default_rng(seed)),
            log_q=log_q.expand(kept).numpy(),
            log_p=log_p.numpy(),
            predictions=predicted,
            adapter_weights=torch.stack(weights[:kept]).cpu().numpy()
            if save_weight_draws
            else None,
        ),
        prior=draw_prior(model, PRIOR_DRAWS, generator),
        prior_draws=PRIOR_DRAWS,
        history=history,
        labels=dict(zip(index.tolist(), labels.tolist(), strict=True)),
        validation_labels=labels_of(validation),
        classes=task.label_names,
        attributes={
            "bayes_lora_version": version("bayes-lora"),
            "task": task.name,
            "training_examples": len(train),
            "rank_structure": model.network.structure.__name__,
            "weight_posterior": "delta" if guide.log_scale is None else "normal",
            "weight_temperature": 1.0
            if guide.log_scale is None
            else model.priors.adapter_weight_temperature,
        },
    )
    return found, predicted


@torch.no_grad()
def _log_density(
    weights: torch.distributions.Independent, values: torch.Tensor, used: torch.Tensor | None
) -> torch.Tensor:
    values = values.double()  # sums of a million terms, of which differences count
    each = weights.base_dist.log_prob(values).cpu()
    return (each if used is None else each * used).sum(-1)


def log_prior(model: BayesianLoRA, gates: Gates, draws: int) -> torch.Tensor:
    """Log prior of draws of reached gates, up to a constant: nats, shape (S,)."""
    logits = Gates(model.rank_prior_logits, model.bit_prior_logits)
    total = log_probability(gates, logits, model).expand(draws)
    factors = [
        model.priors.gates.log_factor(model.network, *draw) for draw in unbound(gates, draws)
    ]
    return total + torch.stack([torch.zeros(()) if f is None else f.cpu() for f in factors])
