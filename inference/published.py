"""What others published about DeBERTaV3-base on GLUE: settings of AdaLoRA, and scores.

Scores are those of the development sets, from table 1 of Zhang et al. 2023 (arXiv 2303.10512):
Matthews correlation for cola, average correlation for stsb, accuracy for the others; mnli is the
mean of matched and mismatched there, qqp of accuracy and F1 (here its score is the accuracy).
Settings are those of the authors' scripts, but for weight decay, steps of warm-up and dropout of
the head; they prune to a mean rank of 1. None of it was measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import pandas as pd

from bayes_lora.errors import InputError
from bayes_lora.inference.config import FinetuneConfig

TASKS = ("mnli", "sst2", "cola", "qqp", "qnli", "rte", "mrpc", "stsb")
SCORES = {
    "full": (0.9001, 0.9563, 0.6919, 0.9110, 0.9403, 0.8375, 0.8946, 0.9160),
    "lora": (0.9067, 0.9495, 0.6982, 0.9069, 0.9387, 0.8520, 0.8995, 0.9160),
    "adalora": (0.9078, 0.9610, 0.7145, 0.9099, 0.9455, 0.8809, 0.9069, 0.9184),
}
"""By method, in the order of `TASKS`; means 0.8809, 0.8834 (rank 8) and 0.8931."""


BACKBONE = "deberta-v3-base"


def published_scores(tasks: Sequence[str]) -> pd.DataFrame:
    """Published scores of these of `TASKS`, one row a method; the mean is that of all eight.

    Examples
    --------
    >>> published_scores(["rte"]).to_dict("records")[2]
    {'published, not measured': 'adalora', 'rte': '0.881', 'mean of GLUE': '0.893'}
    """
    rows = []
    for method, scores in SCORES.items():
        by_task = dict(zip(TASKS, scores, strict=True))
        row = {"published, not measured": method}
        row |= {task: f"{by_task[task]:.3f}" for task in tasks if task in by_task}
        rows.append(row | {"mean of GLUE": f"{fmean(scores):.3f}"})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class AdaLoRASettings:
    """How AdaLoRA prunes, and how it is trained.

    Attributes
    ----------
    initial_rank, target_rank : int
        Rank of all adapters at first, and their mean rank at last.
    before, after : int
        Steps before pruning starts, and after it has ended.
    interval : int
        Steps from one pruning to the next.
    orthogonality : float
        Weight of the regularizer.
    """

    initial_rank: int
    target_rank: int
    before: int
    after: int
    interval: int
    orthogonality: float


@dataclass(frozen=True)
class _Script:
    learning_rate: float
    epochs: float
    max_length: int
    alpha: float
    settings: AdaLoRASettings


_SCRIPTS = {
    "mnli": _Script(5e-4, 7, 256, 16, AdaLoRASettings(3, 1, 8000, 50000, 100, 0.1)),
    "sst2": _Script(8e-4, 24, 128, 16, AdaLoRASettings(2, 1, 6000, 22000, 100, 0.1)),
    "cola": _Script(8e-4, 25, 64, 32, AdaLoRASettings(3, 1, 800, 3500, 10, 0.1)),
    "qqp": _Script(8e-4, 5, 320, 16, AdaLoRASettings(2, 1, 8000, 25000, 100, 0.1)),
    "qnli": _Script(5e-4, 5, 512, 32, AdaLoRASettings(2, 1, 2000, 8000, 100, 0.1)),
    "rte": _Script(1.2e-3, 50, 320, 32, AdaLoRASettings(2, 1, 600, 1800, 1, 0.3)),
    "mrpc": _Script(1e-3, 30, 320, 32, AdaLoRASettings(2, 1, 600, 1800, 1, 0.1)),
    "stsb": _Script(2.2e-3, 25, 128, 32, AdaLoRASettings(2, 1, 800, 2000, 10, 0.3)),
}


def as_published(config: FinetuneConfig) -> tuple[FinetuneConfig, AdaLoRASettings]:
    """AdaLoRA's settings for the task, in place of those that are configured.

    Parameters
    ----------
    config : FinetuneConfig
        Of one of `TASKS`. Learning rate, epochs, batch size, length of texts and alpha are
        replaced.

    Raises
    ------
    InputError
        If nothing was published for the task.

    Examples
    --------
    >>> from bayes_lora.inference.config import parse
    >>> config, settings = as_published(parse(["--task", "rte", "--output_dir", "x"]))
    >>> config.training.learning_rate, settings.orthogonality
    (0.0012, 0.3)
    """
    task = str(config.data.task)
    if task not in _SCRIPTS:
        raise InputError(
            f"adalora_published has no settings for {task}: only for {', '.join(TASKS)}"
        )
    script = _SCRIPTS[task]
    changed = replace(
        config,
        data=replace(config.data, max_length=script.max_length),
        network=replace(config.network, alpha=script.alpha),
        training=replace(
            config.training, learning_rate=script.learning_rate, epochs=script.epochs, batch_size=32
        ),
    )
    return changed, script.settings
