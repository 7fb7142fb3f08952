"""What every method trains on: task, backbone, batches and likelihood, as a configuration says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pyro.nn import PyroModule
from torch import Tensor
from torch.utils.data import DataLoader

from bayes_lora.inference import processes
from bayes_lora.inference.backbone import Backbone, load_backbone
from bayes_lora.inference.batches import evaluation_batches, training_batches
from bayes_lora.inference.config import FinetuneConfig
from bayes_lora.inference.data import load_task
from bayes_lora.inference.encoding import collator, encode_dataset, labels_of
from bayes_lora.inference.options import data_seed
from bayes_lora.inference.tasks import Task
from bayes_lora.models.likelihoods import Classification, LanguageModel, Regression


@dataclass(frozen=True)
class Prepared:
    """Data, backbone and likelihood of a run.

    Attributes
    ----------
    task : Task
        What the labels mean.
    backbone : Backbone
        Pretrained; nothing is frozen yet.
    likelihood : PyroModule
        From the network's output to the distribution of a label.
    train, validation : Dataset
        Encoded.
    batches, validation_batches : DataLoader
        Of the one, shuffled; of the other, all examples.
    collate : function
        From a list of examples to a batch.
    at_once : int
        Batches that make a step: those of all processes, and those that are accumulated.
    """

    task: Task
    backbone: Backbone
    likelihood: PyroModule
    train: Dataset
    validation: Dataset
    batches: DataLoader
    validation_batches: DataLoader
    collate: Callable[[list[Any]], dict[str, Tensor]]
    at_once: int

    @property
    def labels(self) -> NDArray[np.number]:
        """Labels of the validation set, as of `labels_of`."""
        return labels_of(self.validation)

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many passes over the training set, at least one."""
        return max(1, round(epochs * len(self.batches) / self.at_once))


def prepare(config: FinetuneConfig) -> Prepared:
    """Load and encode the data, load the backbone, choose the likelihood.

    Raises
    ------
    InputError
        If data or backbone are not what they should be.
    """
    settings = config.training
    task, *parts = load_task(config.data, data_seed(settings))
    backbone = load_backbone(config.network.backbone, task.num_labels, task.problem)
    train, validation = (
        encode_dataset(part, task, backbone.processor, config.data.max_length) for part in parts
    )
    collate = collator(task, backbone.processor, backbone.model)
    strategy = settings.train_sampling_strategy
    return Prepared(
        task,
        backbone,
        likelihood_for(task, train),
        train,
        validation,
        training_batches(train, collate, settings.batch_size, strategy, settings.seed),
        evaluation_batches(validation, collate),
        collate,
        processes.state().num_processes * settings.gradient_accumulation_steps,
    )


def likelihood_for(task: Task, train: Dataset | None = None) -> PyroModule:
    """The likelihood of a task; a regression's is in the units of the training set, if given."""
    if task.is_language_model:
        return LanguageModel(task.ahead)
    if not task.is_regression:
        return Classification()
    return Regression() if train is None else Regression.of(torch.tensor(train["labels"]))
