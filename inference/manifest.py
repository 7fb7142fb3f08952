"""bayes_lora.json: what an export says of itself, enough to predict with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pyro.distributions import Categorical, Normal, TorchDistribution
from torch import Tensor

from bayes_lora.errors import InputError
from bayes_lora.inference.files import write_text
from bayes_lora.inference.tasks import Task
from bayes_lora.inference.trained import task_of
from bayes_lora.next_tokens import NextTokens

NAME = "bayes_lora.json"
FOR_PEOPLE = {"README.md", "merge_report.json"}


class Manifest(NamedTuple):
    """What an export says of itself.

    The backbone is an absolute path if it is a folder of one's own.

    Attributes
    ----------
    form : str
        A name in `export.FORMATS`.
    backbone : str
        Name on the hub, or folder, of the pretrained model.
    task : Task
        What texts or images and labels mean.
    max_length : int
        Tokens of an example at most.
    noise : float or None
        Standard deviation of a regression's label, in its units.
    units : tuple of two floats
        Factor and shift from the network's output to the units of a regression's label, where the
        head could not take them in; else 1 and 0.
    with_base : bool
        Whether the frozen weights are in the export.
    layers : dict
        By path: sizes, rank, scale and bits of every adapted layer.
    """

    form: str
    backbone: str
    task: Task
    max_length: int
    noise: float | None
    units: tuple[float, float]
    with_base: bool
    layers: dict[str, dict[str, Any]]

    def distribution(self, logits: Tensor) -> TorchDistribution:
        """Distribution of the labels given the network's output, as that of the likelihoods."""
        if self.task.is_language_model:
            return NextTokens(logits.float(), self.task.ahead)
        if self.noise is None:
            return Categorical(logits=logits.float())
        factor, shift = self.units
        return Normal(factor * logits.float().squeeze(-1) + shift, self.noise)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the file whole or not at all; it names what else in the folder is to be read."""
    content = manifest._asdict() | {"task": asdict(manifest.task)}
    content["files"] = sorted({path.name for path in folder.iterdir()} - FOR_PEOPLE)
    content["bayes_lora_version"] = version("bayes-lora")
    write_text(folder / NAME, json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read what `write_manifest` wrote.

    Raises
    ------
    InputError
        If the file is not there, or damaged, or a file that it names is not there.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        content["task"] = task_of(content["task"])
        manifest = Manifest(**{name: content[name] for name in Manifest._fields})
        # without one of its own a tokenizer is made up, and predicts something
        lost = [name for name in content["files"] if not (folder / name).exists()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / NAME} is damaged ({error}): export again") from error
    if lost:
        raise InputError(f"{folder} is damaged: {lost[0]} is not there; export again")
    return manifest
