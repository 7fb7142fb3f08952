"""A finished run, read back from its folder: model and posterior, task, and the decision."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from bayes_lora.errors import InputError
from bayes_lora.inference.assemble import assemble, configured_priors
from bayes_lora.inference.backbone import load_backbone, not_finite
from bayes_lora.inference.batches import evaluation_batches
from bayes_lora.inference.config import FinetuneConfig, parse
from bayes_lora.inference.data import load_task
from bayes_lora.inference.decision import read_decision
from bayes_lora.inference.encoding import Processor, collator, encode_dataset, labels_of
from bayes_lora.inference.files import restarts, write_text
from bayes_lora.inference.options import data_seed
from bayes_lora.inference.prepared import likelihood_for
from bayes_lora.inference.state import fill
from bayes_lora.inference.tasks import Task
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates

NEEDED = ("config.yaml", "task.json", "decision.json", "guide.safetensors", "head.safetensors")


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes
    ----------
    folder : Path
        Where it was read from.
    config : FinetuneConfig
        As it was trained.
    task : Task
        What texts or images and labels mean.
    processor : PreTrainedTokenizerBase or BaseImageProcessor
        Of the backbone.
    model, guide : BayesianLoRA, GateGuide
        The trained pair, on the CPU, without dropout.
    gates : Gates
        The decision: 0 or 1, shapes (L, R) and (L, T, K).
    """

    folder: Path
    config: FinetuneConfig
    task: Task
    processor: Processor
    model: BayesianLoRA
    guide: GateGuide
    gates: Gates


def read_run(folder: Path, decide: bool = False) -> Trained:
    """Read back what `bayes-lora finetune` left.

    Parameters
    ----------
    folder : Path
        Of the run.
    decide : bool
        If its decision cannot be read, say so on standard error, and take the guide's.

    Raises
    ------
    InputError
        If the folder holds no finished run, or several restarts, or a file of it is damaged.
    """
    if inner := restarts(folder):
        names = ", ".join(str(path) for path in inner)
        raise InputError(f"{folder} holds several restarts: name one of {names}")
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise InputError(
            f"{folder} is not the folder of a finished run, it has no {missing[0]}: give one that "
            "bayes-lora finetune wrote"
        )
    config = parse(["--config", str(folder / "config.yaml"), "--output_dir", str(folder)])
    task, num_examples = read_task(folder / "task.json")
    backbone = load_backbone(config.network.backbone, task.num_labels, task.problem)
    with pyro.settings.context(module_local_params=True):
        model, guide = assemble(
            config, backbone, likelihood_for(task), configured_priors(config), num_examples
        )
        _fill(guide, folder / "guide.safetensors")
        _fill(model, folder / "head.safetensors")
    try:
        gates = read_decision(folder / "decision.json", model.network)
    except InputError as error:
        if not decide:
            raise InputError(f"{error}: `bayes-lora decide {folder}` writes it anew") from error
        print(f"bayes-lora: {error}: it is written anew", file=sys.stderr)
        gates = guide.decision()
    return Trained(folder, config, task, backbone.processor, model.eval(), guide, gates)


class Validation(NamedTuple):
    """The validation set of a run: its batches, and labels in the order of the data."""

    loader: DataLoader
    labels: NDArray[np.number]


def validation(run: Trained) -> Validation:
    """Read the validation set that a run had.

    Raises
    ------
    InputError
        If the data are no longer there, or have other classes.
    """
    task, _, examples = load_task(run.config.data, data_seed(run.config.training))
    if task.label_names != run.task.label_names:
        raise InputError(
            f"the classes of the data are {', '.join(task.label_names)} now, those of {run.folder} "
            f"{', '.join(run.task.label_names)}"
        )
    encoded = encode_dataset(examples, run.task, run.processor, run.config.data.max_length)
    collate = collator(run.task, run.processor, run.model.network.backbone)
    return Validation(evaluation_batches(encoded, collate), labels_of(encoded))


def validation_if_there(run: Trained) -> Validation | None:
    """Like `validation`; None, and a word about it, if the data are no longer there."""
    try:
        return validation(run)
    except InputError as error:
        print(f"bayes-lora: nothing is measured, without data: {error}", file=sys.stderr)
        return None


def write_task(path: Path, task: Task, num_examples: int) -> None:
    """Write what texts and labels mean, and how many examples were trained on."""
    content = asdict(task) | {"training_examples": num_examples}
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_task(path: Path) -> tuple[Task, int]:
    """Read what `write_task` wrote.

    Raises
    ------
    InputError
        If the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return task_of(content), int(content["training_examples"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): train again") from error


def task_of(content: Mapping[str, Any]) -> Task:
    """The task that JSON describes; what lacks is a KeyError."""
    found: dict[str, Any] = {f.name: content[f.name] for f in fields(Task)}
    found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return Task(**found)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}): train again") from error


def _fill(module: torch.nn.Module, path: Path) -> None:
    """Put every saved tensor in its place; all that is trained must be there."""
    state = _tensors(path)
    try:
        fill(module, state)
    except ValueError as error:
        raise InputError(
            f"{path.name} does not go with the backbone and the configuration of this run: {error}"
        ) from error
    saved = {name: p for name, p in module.named_parameters() if name in state}
    if bad := not_finite(saved):
        raise InputError(f"{path} is damaged, {bad} is not finite: train again")
    for parameter in saved.values():
        parameter.requires_grad_(True)  # whatever was saved was trained
