"""The options of a run: every field is one of the command line, and a key of a YAML file.

Those of the data are in `data.DataConfig`; `config` reads all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bayes_lora.layers import TENSORS


def _option(default: Any, text: str) -> Any:  # noqa: ANN401 (as dataclasses.field)
    return field(default=default, metadata={"help": text})


@dataclass
class NetworkConfig:
    """The backbone and its adapters."""

    backbone: str | None = _option(
        None, "model name on the hub or folder; default: the weights of the extra `demo`"
    )
    rank: int = _option(8, "components an adapter has at most")
    alpha: float = _option(16.0, "adapters are scaled by alpha / rank")
    target_modules: str = _option(
        "all-linear", "all-linear (of the encoder's blocks), or a regular expression for paths"
    )
    init_adapter: str | None = _option(
        None,
        "folder of a LoRA adapter that PEFT saved, to start from; with its head, no warm-up",
    )
    max_bits: Literal[4, 8, 16, 32] = _option(16, "widest level of a quantized tensor")
    quantized_tensors: list[str] = field(
        default_factory=lambda: list(TENSORS),
        metadata={"help": f"tensors with bit gates, of {', '.join(TENSORS)}"},
    )


@dataclass
class PosteriorConfig:
    """What is random, and its prior."""

    method: Literal["qr", "q", "r", "lora"] = _option(
        "qr", "gates on bits (q), on rank (r), on both, or on neither (lora)"
    )
    rank_structure: Literal["nested", "independent"] = _option("nested", "kind of rank gates")
    weight_posterior: Literal["delta", "normal"] = _option(
        "delta", "posterior of the adapter weights: a point (MAP) or mean-field normal"
    )
    weight_prior_scale: float | None = _option(
        None, "prior standard deviation of adapter weights; default: as in models/priors.py"
    )
    weight_temperature: float | None = _option(
        None, "weight of the KL of adapter weights; below 1 a cold posterior; default: as there"
    )
    price: float | None = _option(
        None, "nats that all bit operations are worth; default: as in models/priors.py"
    )
    target_bops: float | None = _option(
        None, "share of 32-bit operations for the decision to take; the price is then found"
    )
    refine_epochs: float = _option(
        0.0,
        "passes over the training set that refine the posterior to that of discrete gates; "
        "not with quantized activations",
    )
    draws: int = _option(8, "of gates and weights, that predictions are averaged over")
    save_weight_draws: bool = _option(False, "keep adapter weights in posterior.nc as well")
    prior_predictive: bool = _option(
        False, "only show what the prior implies for rank, bits and bit operations; no training"
    )


@dataclass
class TrainingConfig:
    """The run."""

    output_dir: str = _option("", "folder for everything the run writes (required)")
    overwrite: bool = _option(False, "replace a run that output_dir already holds")
    resume: bool = _option(
        False, "go on after the last checkpoint in output_dir; from the start if it is empty"
    )
    save_minutes: float = _option(5.0, "minutes from one checkpoint to the next, at most")
    save_steps: int | None = _option(None, "steps from one checkpoint to the next, at most")
    save_total_limit: int = _option(2, "checkpoints that are kept, until the run is finished")
    epochs: float = _option(10.0, "passes over the training set, all phases together")
    batch_size: int = _option(32, "examples in a batch of each process")
    gradient_accumulation_steps: int = _option(
        1, "batches whose gradients make a step, each with its own draw of the gates"
    )
    gradient_checkpointing: bool = _option(
        False, "compute activations twice instead of keeping them: less memory, more time"
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = _option(
        "random", "group_by_length makes batches of like length: less padding, less variety"
    )
    learning_rate: float = _option(1e-3, "of adapter weights and head; decays linearly")
    gate_learning_rate: float | None = _option(
        None, "of the gates; default: 30 over the steps with sampled gates"
    )
    max_grad_norm: float = _option(1.0, "clipping, of the gradient of -ELBO / N")
    warmup_share: float = _option(0.25, "share of the steps with open gates, unquantized")
    anneal_share: float = _option(0.2, "share of the steps in which the KL weight rises")
    joint_share: float = _option(0.25, "share of the steps at full KL weight; the rest settles")
    mixed_precision: Literal["no", "bf16", "fp16"] = _option("no", "autocast of the network")
    seed: int = _option(0, "of everything random")
    data_seed: int | None = _option(
        None, "draws max_train_examples and holdout_share; default: seed"
    )
    restarts: int = _option(1, "independent runs, of seeds seed, seed + 1, ...: the chains")


def data_seed(settings: TrainingConfig) -> int:
    """Seed of what is drawn from the training set: that of the run, unless told otherwise."""
    return settings.seed if settings.data_seed is None else settings.data_seed
