"""The configuration: dataclasses that are the command line, and the same as a YAML file.

Every field is an option (`--learning_rate 1e-3`) and a key of the file given by `--config`; an
option on the command line overrides the file. The options are in `options` and `data.DataConfig`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import yaml
from transformers import HfArgumentParser

from bayes_lora.errors import InputError
from bayes_lora.inference.data import DataConfig
from bayes_lora.inference.options import NetworkConfig, PosteriorConfig, TrainingConfig


@dataclass
class FinetuneConfig:
    """Everything that `bayes-lora finetune` is told.

    Examples
    --------
    >>> config = parse(["--task", "mrpc", "--output_dir", "runs/mrpc", "--rank", "4"])
    >>> config.data.task, config.network.rank, config.posterior.method
    ('mrpc', 4, 'qr')
    """

    data: DataConfig
    network: NetworkConfig
    posterior: PosteriorConfig
    training: TrainingConfig

    def check(self) -> None:
        """Check what needs no data.

        Raises
        ------
        InputError
            If a number is out of its range.
        """
        network, posterior, training = self.network, self.posterior, self.training
        shares = (training.warmup_share, training.anneal_share, training.joint_share)
        rules = {
            "output_dir is missing: say where the run goes": bool(
                training.output_dir or posterior.prior_predictive
            ),
            f"rank is {network.rank}: give at least 1": network.rank >= 1,
            f"alpha is {network.alpha}: give a number > 0": 0 < network.alpha < math.inf,
            f"epochs is {training.epochs}: give a number > 0": 0 < training.epochs < math.inf,
            f"seed is {training.seed}: give one from 0 to 4294967295, restarts counted in": (
                0 <= training.seed <= 2**32 - max(training.restarts, 1)
            ),
            f"data_seed is {training.data_seed}: give one from 0 to 4294967295": (
                training.data_seed is None or 0 <= training.data_seed < 2**32
            ),
            f"max_grad_norm is {training.max_grad_norm}: give a number > 0": (
                training.max_grad_norm > 0
            ),
            f"batch_size is {training.batch_size}: give at least 1": training.batch_size >= 1,
            "gradient_accumulation_steps is below 1: give at least 1": (
                training.gradient_accumulation_steps >= 1
            ),
            f"learning_rate is {training.learning_rate}: give a number > 0": (
                0 < training.learning_rate < math.inf
            ),
            "images have no length to be grouped by: leave out train_sampling_strategy": (
                self.data.task != "image_classification"
                or training.train_sampling_strategy == "random"
            ),
            f"gate_learning_rate is {training.gate_learning_rate}: give a number > 0": (
                training.gate_learning_rate is None or 0 < training.gate_learning_rate < math.inf
            ),
            f"weight_prior_scale is {posterior.weight_prior_scale}: give a number > 0": (
                posterior.weight_prior_scale is None or 0 < posterior.weight_prior_scale < math.inf
            ),
            f"weight_temperature is {posterior.weight_temperature}: give a number > 0": (
                posterior.weight_temperature is None or 0 < posterior.weight_temperature < math.inf
            ),
            f"price is {posterior.price}: give a number >= 0": (
                posterior.price is None or 0 <= posterior.price < math.inf
            ),
            f"target_bops is {posterior.target_bops}: give a share in (0, 1)": (
                posterior.target_bops is None or 0 < posterior.target_bops < 1
            ),
            f"refine_epochs is {posterior.refine_epochs}: give at least 0": (
                0 <= posterior.refine_epochs < math.inf
            ),
            "refine_epochs needs gates, and gradients that pass no quantized activations: choose "
            "--method r, or leave input and hidden out of --quantized_tensors": (
                posterior.refine_epochs == 0
                or posterior.method == "r"
                or (
                    posterior.method in ("q", "qr")
                    and not {"input", "hidden"} & set(network.quantized_tensors)
                )
            ),
            "prior_predictive shows the prior at one price: give --price, not --target_bops": (
                posterior.target_bops is None or not posterior.prior_predictive
            ),
            f"draws is {posterior.draws}: give at least 1": posterior.draws >= 1,
            f"save_minutes is {training.save_minutes}: give a number > 0": training.save_minutes
            > 0,
            f"save_steps is {training.save_steps}: give at least 1": (
                training.save_steps is None or training.save_steps >= 1
            ),
            f"save_total_limit is {training.save_total_limit}: give at least 1": (
                training.save_total_limit >= 1
            ),
            "overwrite and resume exclude each other: give one": not (
                training.overwrite and training.resume
            ),
            f"restarts is {training.restarts}: give at least 1": training.restarts >= 1,
            "quantized_tensors is empty: name some, or choose --method r": bool(
                network.quantized_tensors or posterior.method in ("r", "lora")
            ),
            "price and target_bops exclude each other: give one": (
                posterior.price is None or posterior.target_bops is None
            ),
            f"phase shares are {shares}: none below 0, their sum at most 1": (
                min(shares) >= 0 and sum(shares) <= 1
            ),
        }
        for message, holds in rules.items():
            if not holds:
                raise InputError(message)

    def to_yaml(self, notes: Sequence[str] = ()) -> str:
        """The configuration as a file for `--config`; versions and notes are comments.

        `overwrite` and `resume` are left out: they say what to do with a run that is there.
        """
        packages = ("bayes-lora", "torch", "pyro-ppl", "transformers", "datasets", "accelerate")
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        header = [f"{versions}, python {sys.version.split()[0]}", *notes]
        flat = {k: v for part in vars(self).values() for k, v in asdict(part).items()}
        flat = {k: v for k, v in flat.items() if k not in NOT_IN_FILES}
        lines = "".join(f"# {line}\n" for line in header)
        return lines + yaml.safe_dump(flat, sort_keys=False)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        names = (o for o in self._option_string_actions if o.startswith("--"))
        options = ", ".join(sorted(name for name in names if "-" not in name[2:]))
        hint = f"; options: {options}" if "unrecognized" in message else ""
        raise InputError(f"{message}{hint}")


NOT_IN_FILES = {"overwrite", "resume", "prior_predictive"}
PARTS = (DataConfig, NetworkConfig, PosteriorConfig, TrainingConfig)


def parse(arguments: Sequence[str] | None = None) -> FinetuneConfig:
    """Read the command line, and the YAML file it may name.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: the process's own.

    Returns
    -------
    FinetuneConfig
        Checked as far as that needs no data.

    Raises
    ------
    InputError
        For an unknown option or key, a malformed value or file, a number out of range.
    """
    parser = _Parser(
        PARTS,  # type: ignore[arg-type]
        prog="bayes-lora finetune",
        description="Fine-tune a transformer; rank and bits of its adapters are inferred by SVI.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with any of these options")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if file := parser.parse_known_args(arguments)[0].config:
        # as options before the real ones, so that they are checked alike and overridden
        arguments = [*_options_of(file), *arguments]
    namespace = parser.parse_args(arguments)
    parts = [part(**{f.name: getattr(namespace, f.name) for f in fields(part)}) for part in PARTS]
    config = FinetuneConfig(*parts)  # type: ignore[arg-type]
    config.check()
    return config


def _options_of(file: str) -> list[str]:
    try:
        # every scalar as it is written: `no` is a precision, or a column, not False
        content = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read --config {file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {file} must hold `option: value` lines")
    known = {f.name for part in PARTS for f in fields(part)} - NOT_IN_FILES
    if unknown := sorted(set(map(str, content)) - known):
        raise InputError(
            f"--config {file}: unknown {', '.join(unknown)}; options: {', '.join(sorted(known))}"
        )
    options: list[str] = []
    for key, value in content.items():
        if value in ("", "~", "null"):
            continue
        values = value if isinstance(value, list) else [value]
        options += [f"--{key}", *map(str, values)]
    return options
