"""What a finished training leaves in its folder: decision, metrics, pictures, posterior."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

from bayes_lora.costs import totals
from bayes_lora.inference.budget import TOLERANCE
from bayes_lora.inference.bundle import write_bundle
from bayes_lora.inference.config import FinetuneConfig
from bayes_lora.inference.decision import MORE_PROBABLE_SIDE, write_decision
from bayes_lora.inference.encoding import labels_of
from bayes_lora.inference.files import write_figure, write_text
from bayes_lora.inference.heat_maps import plot_rank_and_bits
from bayes_lora.inference.history import History
from bayes_lora.inference.metrics import LEAST_GAIN, constant_nll, evaluate_predictions
from bayes_lora.inference.posterior import sample_posterior
from bayes_lora.inference.predict import predict
from bayes_lora.inference.prepared import Prepared
from bayes_lora.inference.table import rank_and_bits_table
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates


def write_results(
    folder: Path,
    config: FinetuneConfig,
    data: Prepared,
    model: BayesianLoRA,
    guide: GateGuide,
    gates: Gates,
    history: History,
    unsettled: dict[str, float],
    begun: float,
) -> dict[str, float]:
    """Evaluate a trained pair, and write all that is not written yet.

    Parameters
    ----------
    folder : Path
        Of the run.
    config, data : FinetuneConfig, Prepared
        What was trained, and on what.
    model, guide : BayesianLoRA, GateGuide
        Trained.
    gates : Gates
        The decision.
    history : History
        Of the training.
    unsettled : dict of str to float
        Metrics of before the weights settled.
    begun : float
        When the run began, `time.monotonic()`.

    Returns
    -------
    dict of str to float
        What `metrics.json` holds.
    """
    write_decision(folder / "decision.json", model.network, gates, MORE_PROBABLE_SIDE)
    end = history.last(data.steps(1))
    decided = totals(model.network, *gates)
    share, budget = decided["relative_bops_32"], getattr(model.priors.gates, "budget", None)
    if budget is not None and abs(share / budget - 1) > TOLERANCE:
        warnings.warn(
            f"the decision takes {share:.2%} of all bit operations, not the {budget:.2%} wanted: "
            f"the data ask for {'no more' if share < budget else 'more'} at any price in reach",
            stacklevel=2,
        )
    reached = -end["log_likelihood"] / len(data.train)
    if not data.task.is_language_model and (  # which has learned before
        reached > constant_nll(labels_of(data.train), data.task.is_regression) - LEAST_GAIN
    ):
        warnings.warn(
            f"nothing was learned: NLL on the training set is {reached:.3f} nats an example, no "
            "better than by the labels' frequencies. Gates close over adapters that have learned "
            "nothing: give more --epochs or --warmup_share, or another --learning_rate",
            stacklevel=2,
        )
    metrics = {
        **evaluate_predictions(
            data.task, predict(model, guide, data.validation_batches, gates), data.labels
        ),
        **unsettled,
        **end,
        **decided,
        "trainable_parameters": sum(
            p.numel() for part in (model, guide) for p in part.parameters() if p.requires_grad
        ),
        "seconds": time.monotonic() - begun,
    }
    if model.gated:
        table = rank_and_bits_table(model.network, guide.open_probabilities(), gates)
        write_text(folder / "table.txt", table)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")

    posterior, prediction = sample_posterior(
        model, guide, data.task, data.train, data.validation, data.collate, history,
        config.posterior.draws, config.training.seed, config.posterior.save_weight_draws,
    )  # fmt: skip
    write_bundle(folder / "posterior.nc", posterior)
    if model.gated:
        write_figure(folder / "rank_and_bits.png", plot_rank_and_bits(posterior))
    over_draws = evaluate_predictions(data.task, prediction.averaged(), data.labels)
    metrics |= {f"averaged_{name}": value for name, value in over_draws.items()}
    metrics["seconds"] = time.monotonic() - begun
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def finished(folder: Path) -> dict[str, float] | None:
    """Metrics of a run that came to its end, or None."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(metrics) if "averaged_score" in metrics else None
