"""Model, guide and priors as a configuration says; and the configuration as these say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from pyro.nn import PyroModule
from torch import Tensor

from bayes_lora.costs import relative_bops
from bayes_lora.errors import InputError, one_line
from bayes_lora.gates import STRUCTURES
from bayes_lora.inference.backbone import Backbone, absolute
from bayes_lora.inference.config import FinetuneConfig
from bayes_lora.inference.options import data_seed
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import NORMAL_WEIGHTS, Priors
from bayes_lora.network import AdaptedNetwork


def assemble(
    config: FinetuneConfig,
    backbone: Backbone,
    likelihood: PyroModule,
    priors: Priors,
    num_examples: int,
) -> tuple[BayesianLoRA, GateGuide]:
    """Put model and guide together as configured.

    Parameters
    ----------
    config : FinetuneConfig
        Network, posterior, seed and gradient checkpointing are looked at.
    backbone : Backbone
        The pretrained transformer; its model is adapted in place.
    likelihood : PyroModule
        From the network's output to the distribution of a label.
    priors : Priors
        As from `configured_priors`, or any other.
    num_examples : int
        N, the size of the training set.

    Returns
    -------
    tuple of BayesianLoRA and GateGuide
        Untrained.

    Raises
    ------
    InputError
        If no layer matches, no setting of the gates could meet the budget, or the backbone has no
        gradient checkpointing.
    """
    settings, posterior = config.network, config.posterior
    network = AdaptedNetwork(
        backbone.model,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        quantized_tensors=settings.quantized_tensors,
        num_levels=settings.max_bits.bit_length() - 2,
        structure=STRUCTURES[posterior.rank_structure],
        trained_parameters=backbone.new_parameters,
    )
    if config.training.gradient_checkpointing:
        try:
            network.gradient_checkpointing_enable()
        except ValueError as error:
            raise InputError(f"leave out gradient_checkpointing: {one_line(error)}") from error
    model = BayesianLoRA(
        network,
        likelihood,
        priors,
        num_examples,
        rank_gates=posterior.method in ("r", "qr"),
        bit_gates=posterior.method in ("q", "qr"),
    )
    if posterior.target_bops is not None:
        _check_budget(model, posterior.target_bops)
    generator = torch.Generator().manual_seed(config.training.seed)
    initial = network.initial_adapter_weights(generator)
    return model, GateGuide(model, initial, posterior.weight_posterior == "normal")


def configured_priors(config: FinetuneConfig) -> Priors:
    """The priors as their page says, but for what the options say.

    Raises
    ------
    InputError
        If an option is for another kind of gate prior than the page has.
    """
    priors, options = Priors(), config.posterior
    if options.weight_posterior == "normal":
        for name, number in NORMAL_WEIGHTS.items():
            setattr(priors, name, number)
    if options.weight_prior_scale is not None:
        priors.adapter_weight_scale = options.weight_prior_scale
    if options.weight_temperature is not None:
        priors.adapter_weight_temperature = options.weight_temperature
    for option, name, value in (
        ("price", "price", options.price),
        ("target_bops", "budget", options.target_bops),
    ):
        if value is None:
            continue
        if not hasattr(priors.gates, name):
            kind = type(priors.gates).__name__
            raise InputError(f"{option} is not for the {kind} of models/priors.py: leave it out")
        setattr(priors.gates, name, value)
    if options.price is not None and hasattr(priors.gates, "budget"):
        priors.gates.budget = None
    return priors


def resolve(
    config: FinetuneConfig, task: str, gate_learning_rate: float, priors: Priors
) -> FinetuneConfig:
    """The configuration with what was left to defaults filled in, as far as options can say it."""
    posterior = replace(
        config.posterior,
        weight_prior_scale=priors.adapter_weight_scale,
        weight_temperature=priors.adapter_weight_temperature,
    )
    if getattr(priors.gates, "budget", None) is None:
        posterior.price = getattr(priors.gates, "price", None)
    training = replace(
        config.training, gate_learning_rate=gate_learning_rate, data_seed=data_seed(config.training)
    )
    network = config.network
    if network.backbone is not None:
        network = replace(network, backbone=absolute(network.backbone))
    data = replace(
        config.data, task=task, train_file=_absolute(config.data.train_file),
        validation_file=_absolute(config.data.validation_file),
        data_dir=_absolute(config.data.data_dir),
    )  # fmt: skip
    return replace(config, data=data, network=network, posterior=posterior, training=training)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _check_budget(model: BayesianLoRA, budget: float) -> None:
    network = model.network
    if not model.gated:
        raise InputError("target_bops needs gates: choose another method than lora")

    def share(gates: Callable[..., Tensor]) -> float:
        rank_gate = gates(network.rank_gate_shape) if model.rank_gates else None
        bit_gate = gates(network.bit_gate_shape) if model.bit_gates else None
        return float(relative_bops(network, rank_gate, bit_gate))

    least, most = share(torch.zeros), share(torch.ones)
    if budget <= least:
        raise InputError(
            f"target_bops is {budget}, but with every gate closed {least:.4g} are left: "
            "give more, or gates to more tensors (--method, --quantized_tensors, --target_modules)"
        )
    if budget > most:
        raise InputError(
            f"target_bops is {budget}, but with every gate open it is {most:.4g}: give less"
        )
