"""Data: from the configuration to training and validation sets.

    generator, folder, files or hub  ->  columns  ->  checked texts or images, and labels

Whatever the source, every row is checked before training starts; an error names file and row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from datasets import Dataset

from bayes_lora.errors import InputError
from bayes_lora.inference.agreement import generate
from bayes_lora.inference.images import PATHS, read_folder
from bayes_lora.inference.sources import find_file, load_glue, read_file
from bayes_lora.inference.tasks import (
    TASKS,
    Columns,
    Task,
    check_examples,
    infer_task,
    language_task,
)

OWN = ("causal_lm", "seq2seq_lm", "image_classification")
"""Tasks of which the user has the examples."""

NUM_TRAIN, NUM_VALIDATION = 3000, 1000
"""Examples of the embedded task; the same in every run, as those of GLUE are."""


@dataclass
class DataConfig:
    """Which task, where its examples are, and how much of them to use.

    Examples
    --------
    >>> DataConfig(task="cola", data_dir="data/glue").max_length
    128
    """

    task: str = field(
        default="agreement",
        metadata={
            "help": "agreement (embedded), causal_lm (texts of your own), seq2seq_lm (pairs of "
            "them), image_classification (images of your own), or cola, sst2, mrpc, qqp, stsb, "
            "mnli, qnli, rte of GLUE"
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder with <task>/train.* and <task>/validation.*, "
            "as jsonl, json (one object a line), csv, tsv, parquet, or txt (one text a line); for "
            "image_classification with train/<class>/ and validation/<class>/, which hold images"
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "training examples of your own, in one of these formats; images by their "
            "paths, relative to the file"
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "validation examples that go with train_file"}
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "one or two columns of train_file; default: its only column of text"},
    )
    label_column: str = field(
        default="label", metadata={"help": "column of train_file with the label"}
    )
    problem: Literal["classification", "regression"] | None = field(
        default=None,
        metadata={"help": "default: regression if labels of train_file have decimal points"},
    )
    max_length: int = field(
        default=128,
        metadata={
            "help": "tokens of an example at most; what is longer is cut off, or with causal_lm is "
            "several examples"
        },
    )
    max_train_examples: int | None = field(
        default=None,
        metadata={"help": "train on a random subset of this size, drawn with data_seed"},
    )
    holdout_share: float | None = field(
        default=None,
        metadata={
            "help": "validate on this share of the training set, left out of it, instead of on the "
            "validation set: to choose settings by"
        },
    )


def load_task(config: DataConfig, seed: int) -> tuple[Task, Dataset, Dataset]:
    """Find the task, read its training and validation examples, and check every row.

    Parameters
    ----------
    config : DataConfig
        If `train_file` is given, that and `validation_file` are read as task ``custom``; else
        `task` is read from `data_dir`, generated, or loaded from the hub. Images are read from
        these files or from `data_dir`.
    seed : int
        Draws the subset of `max_train_examples` and the part held out, and nothing else.

    Returns
    -------
    tuple of Task, Dataset and Dataset
        Task, training set, validation set: the text columns, and the label column with class ids
        or floats.

    Raises
    ------
    InputError
        If options contradict each other, the task is unknown, a file is missing or cannot be
        parsed, its rows are not what the task needs, or the hub cannot be reached.

    Examples
    --------
    >>> task, train, validation = load_task(DataConfig(max_train_examples=100), seed=0)
    >>> task.name, len(train), len(validation), train.column_names
    ('agreement', 100, 1000, ['sentence', 'label'])
    """
    _check(config)
    if config.task == "image_classification":
        task, origins, columns = _images(config)
    elif config.train_file and config.validation_file:
        origins = [config.train_file, config.validation_file]
        columns = [read_file(Path(file)) for file in origins]
        if config.task == "causal_lm":
            task = language_task(columns[0], config.text_columns, config.train_file)
        else:
            problem = "seq2seq_lm" if config.task == "seq2seq_lm" else config.problem
            options = (config.text_columns, config.label_column, problem)
            task = infer_task(columns[0], *options, origin=config.train_file)
    else:
        task = TASKS[config.task]
        origins = [f"{task.name} {split}" for split in ("train", "validation")]
        if config.data_dir:
            folder = Path(config.data_dir) / task.name
            origins = [str(find_file(folder, split)) for split in ("train", "validation")]
            columns = [read_file(Path(file)) for file in origins]
        elif task.name == "agreement":
            columns = [
                Dataset.from_list(generate(NUM_TRAIN, seed=0, split="train"))[:],
                Dataset.from_list(generate(NUM_VALIDATION, seed=0, split="validation"))[:],
            ]
        else:
            columns = load_glue(task.name)
    train, validation = map(check_examples, (task, task), columns, origins)
    if config.max_train_examples is not None:
        size = min(config.max_train_examples, len(train))
        train = train.shuffle(seed=seed).select(range(size))
    if config.holdout_share is not None:
        size = round(config.holdout_share * len(train))
        if not 0 < size < len(train):
            raise InputError(f"holdout_share leaves {len(train) - size} examples to train on")
        parts = train.train_test_split(test_size=size, seed=seed)
        train, validation = parts["train"], parts["test"]
    return task, train, validation


def _images(config: DataConfig) -> tuple[Task, list[str], list[Columns]]:
    """Task, names and columns of training and validation images."""
    if config.train_file and config.validation_file:
        origins = [config.train_file, config.validation_file]
        columns = [read_file(Path(file)) for file in origins]
        found = infer_task(
            columns[0], config.text_columns, config.label_column, "classification", origins[0]
        )
        (paths,) = found.text_columns
        for file, table in zip(origins, columns, strict=True):
            beside = Path(file).resolve().parent
            table |= {
                name: [str(beside / path) if isinstance(path, str) else path for path in values]
                for name, values in table.items()
                if name == paths
            }
    else:
        origins = [str(Path(config.data_dir or "") / split) for split in ("train", "validation")]
        columns = [read_folder(Path(folder)) for folder in origins]
        found = infer_task(columns[0], [PATHS], origin=origins[0])
    return replace(found, name=config.task, problem="image_classification"), origins, columns


def _check(config: DataConfig) -> None:
    """Refuse options that are out of range or contradict each other."""
    if config.max_length < 8:
        raise InputError(f"max_length is {config.max_length}; give at least 8 tokens")
    if config.max_train_examples is not None and config.max_train_examples < 1:
        raise InputError(f"max_train_examples is {config.max_train_examples}; give at least 1")
    if config.holdout_share is not None and not 0 < config.holdout_share < 1:
        raise InputError(f"holdout_share is {config.holdout_share}; give a share in (0, 1)")
    if bool(config.train_file) != bool(config.validation_file):
        raise InputError("train_file and validation_file go together; give both, or neither")
    if config.train_file:
        if config.data_dir or config.task not in ("agreement", "custom", *OWN):
            raise InputError("train_file excludes data_dir and a named task; leave these out")
        texts = config.text_columns or ["one"]
        if config.task == "causal_lm" and (
            config.problem or config.label_column != "label" or len(texts) > 1
        ):
            raise InputError(
                "causal_lm has no label but the text, one column: leave out problem and "
                "label_column, and name one of text_columns at most"
            )
        if len(texts) > 2 or config.label_column in texts:
            raise InputError("text_columns must be one or two, without label_column")
        if config.task in OWN and (config.problem or len(texts) > 1):
            raise InputError(
                f"{config.task} has one column besides the label: leave out problem, and name one "
                "of text_columns at most"
            )
    elif config.task not in (*TASKS, "image_classification"):
        raise InputError(
            f"unknown task {config.task!r}; there are {', '.join(TASKS)}, image_classification, or "
            "give train_file and validation_file of your own"
        )
    elif config.task in OWN and not config.data_dir:
        raise InputError(
            f"{config.task} needs examples of your own: give data_dir, or train_file and "
            "validation_file"
        )
    elif config.text_columns or config.problem or config.label_column != "label":
        raise InputError("text_columns, label_column and problem are for train_file; add that")
