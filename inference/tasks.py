"""Tasks: which columns hold the text, what the labels mean, and which metrics judge predictions.

Known tasks are eight of GLUE (Wang et al. 2018, arXiv 1804.07461) with the columns and label ids of
the hub's `nyu-mll/glue`, the embedded `agreement`, `causal_lm`, texts that are to be continued, and
`seq2seq_lm`, texts to be written for others. What files of one's own mean, and images in folders,
is inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from tqdm.auto import tqdm

from bayes_lora.errors import InputError
from bayes_lora.inference.images import why_unreadable

LARGEST_LABEL = 1e38  # that of float32 is 3.4e38

Columns = dict[str, list[Any]]
"""Values of a table's rows by column, all lists of one length."""

Problem = Literal["classification", "regression", "causal_lm", "seq2seq_lm", "image_classification"]
"""What is predicted: the class of a text, a number, the text itself, another text, or the class of
an image."""


@dataclass(frozen=True)
class Task:
    """What the columns of a data set mean.

    Attributes
    ----------
    name : str
        As in `DataConfig.task`, or ``custom``.
    text_columns : tuple of str
        One column, or two for pairs of texts; of images, that of their paths.
    metrics : tuple of str
        Names in `bayes_lora.inference.metrics`, the headline first.
    label_names : tuple of str
        Name of every class in the order of its id; empty where there are no classes.
    label_column : str
        Column of the label; that of the text, where a language model predicts it.
    problem : str
        What is predicted.

    Examples
    --------
    >>> TASKS["mnli"].num_labels, TASKS["stsb"].num_labels, TASKS["stsb"].is_regression
    (3, 1, True)
    """

    name: str
    text_columns: tuple[str, ...]
    metrics: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    label_column: str = "label"
    problem: Problem = "classification"

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number to predict, not a class."""
        return self.problem == "regression"

    @property
    def is_language_model(self) -> bool:
        """Whether the label is a text, the one that is read or another."""
        return self.problem in ("causal_lm", "seq2seq_lm")

    @property
    def ahead(self) -> int:
        """Places from a language model's logits to their token, as of `NextTokens`."""
        return int(self.problem == "causal_lm")

    @property
    def given_columns(self) -> tuple[str, ...]:
        """Columns of text that a prediction needs: also the label, whose probability is asked."""
        if self.problem == "seq2seq_lm":
            return (*self.text_columns, self.label_column)
        return self.text_columns

    @property
    def has_images(self) -> bool:
        """Whether what is read are images, and texts are their paths."""
        return self.problem == "image_classification"

    @property
    def num_labels(self) -> int | None:
        """Outputs that the head needs: one for each class, or 1 for regression.

        None for a language model, whose head is pretrained.
        """
        return None if self.is_language_model else len(self.label_names) or 1


_PAIR = ("sentence1", "sentence2")
_ACCEPTABILITY = ("unacceptable", "acceptable")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")

TASKS = {
    task.name: task
    for task in (
        Task("agreement", ("sentence",), ("accuracy",), _ACCEPTABILITY),
        Task("cola", ("sentence",), ("matthews", "accuracy"), _ACCEPTABILITY),
        Task("sst2", ("sentence",), ("accuracy",), ("negative", "positive")),
        Task("mrpc", _PAIR, ("accuracy", "f1"), ("not_equivalent", "equivalent")),
        Task("qqp", ("question1", "question2"), ("accuracy", "f1"), ("not_duplicate", "duplicate")),
        Task("stsb", _PAIR, ("pearson", "spearman"), problem="regression"),
        Task("mnli", ("premise", "hypothesis"), ("accuracy",), _NLI),
        Task("qnli", ("question", "sentence"), ("accuracy",), _ENTAILMENT),
        Task("rte", _PAIR, ("accuracy",), _ENTAILMENT),
        Task("causal_lm", ("text",), ("perplexity",), (), "text", "causal_lm"),
        Task("seq2seq_lm", ("source",), ("perplexity",), (), "target", "seq2seq_lm"),
    )
}
"""The known tasks by name."""


def infer_task(
    columns: Columns,
    text_columns: list[str] | None = None,
    label_column: str = "label",
    problem: Problem | None = None,
    origin: str = "train_file",
) -> Task:
    """Infer the task of a custom training set.

    Parameters
    ----------
    columns : dict of str to list
        The training examples.
    text_columns : list of str, optional
        Default: the only column of text besides the label.
    label_column : str
        Classes have ids by the sorted order of what is found here.
    problem : str, optional
        Default: regression if any label is a float, else classification.
    origin : str
        What to call the examples in an error message.

    Raises
    ------
    InputError
        If there is no label column, no single column of text, or there are no two classes.

    Examples
    --------
    >>> infer_task({"text": ["a", "b"], "label": ["spam", "ham"]}).label_names
    ('ham', 'spam')
    >>> infer_task({"text": ["a", "b"], "label": [1.5, 2.0]}).is_regression
    True
    """
    if label_column not in columns:
        raise InputError(f"{origin} has no column {label_column!r}; it has {', '.join(columns)}")
    texts = text_columns or [name for name in _of_text(columns) if name != label_column]
    if not text_columns and len(texts) != 1:
        raise InputError(
            f"{origin} has {len(texts)} columns of text besides {label_column!r}; name one or two "
            f"as text_columns; its columns are {', '.join(columns)}"
        )
    if problem == "seq2seq_lm":
        return Task(problem, tuple(texts), ("perplexity",), (), label_column, problem)
    # what is not a number does not equal itself
    labels = [y for y in columns[label_column] if not _is_missing(y) and y == y]
    if problem is None:
        has_floats = any(isinstance(label, float) for label in labels)
        problem = "regression" if has_floats else "classification"
    if problem == "regression":
        return Task("custom", tuple(texts), ("pearson", "spearman"), (), label_column, problem)
    try:
        names = tuple(str(label) for label in sorted(set(labels)))
    except TypeError as error:
        raise InputError(f"{origin}: labels must be all numbers or all texts") from error
    if len(names) < 2:
        raise InputError(f"{origin} has {len(names)} classes; it needs two or more")
    return Task("custom", tuple(texts), ("accuracy",), names, label_column)


def language_task(columns: Columns, text_columns: list[str] | None, origin: str) -> Task:
    """The task to predict the tokens of a column: the one named, or the only one of text.

    Raises
    ------
    InputError
        If there is no such single column.

    Examples
    --------
    >>> language_task({"id": [1, 2], "body": ["a", "b"]}, None, "train.csv").label_column
    'body'
    """
    texts = text_columns or _of_text(columns)
    if len(texts) != 1:
        raise InputError(
            f"{origin} has {len(texts)} columns of text; name one as text_columns; its columns are "
            f"{', '.join(columns)}"
        )
    return Task("causal_lm", tuple(texts), ("perplexity",), (), texts[0], "causal_lm")


def check_examples(task: Task, columns: Columns, origin: str) -> Dataset:
    """Check every row, and put class ids or floats in place of the labels.

    Parameters
    ----------
    task : Task
        Its labels are class ids where it is known, and class names where it is custom. Texts that
        are labels stay as they are.
    columns : dict of str to list
        Must have the task's columns; others are left out.
    origin : str
        What to call the examples in an error message; rows are counted from 1.

    Raises
    ------
    InputError
        If a column is missing, there are no rows, a text is no text, an image cannot be read, or
        a label is missing, is none of the classes, or is no finite number in a regression.

    Examples
    --------
    >>> task = infer_task({"text": ["a", "b"], "label": ["spam", "ham"]})
    >>> check_examples(task, {"text": ["c"], "label": ["spam"]}, "validation")[0]
    {'text': 'c', 'label': 1}
    """
    for name in (*task.text_columns, task.label_column):
        if name not in columns:
            raise InputError(f"{origin} has no column {name!r}; it has {', '.join(columns)}")
    for name in task.given_columns:
        for row, text in enumerate(columns[name], start=1):
            where = f"{origin}, row {row}: {name}"
            if text is None:
                raise InputError(f"{where} is missing; give a text, or leave the row out")
            if not isinstance(text, str):
                raise InputError(f"{where} is {text!r}; give a text")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InputError(f"{where} is not UTF-8; write it in that encoding")
    if not columns[task.text_columns[0]]:
        raise InputError(f"{origin} has no examples; give at least one")
    if task.has_images:
        paths = tqdm(columns[task.text_columns[0]], desc="images", unit="image", disable=None)
        for row, path in enumerate(paths, start=1):
            if wrong := why_unreadable(path):
                raise InputError(f"{origin}, row {row}: {wrong}; replace it, or leave it out")
    texts = {name: columns[name] for name in task.given_columns}
    if task.is_language_model:
        return Dataset.from_dict(texts)
    # Files of known tasks hold ids, others names.
    names = map(str, range(task.num_labels or 0)) if task.name in TASKS else task.label_names
    ids = {name: i for i, name in enumerate(names)}
    labels: list[float] = []
    for row, label in enumerate(columns[task.label_column], start=1):
        where = f"{origin}, row {row}: {task.label_column}"
        if _is_missing(label):
            raise InputError(f"{where} is missing; give one, or leave the row out")
        if task.is_regression:
            is_number = isinstance(label, int | float) and not isinstance(label, bool)
            if not (is_number and -LARGEST_LABEL < label < LARGEST_LABEL):
                raise InputError(f"{where} is {label!r:.30}; regression needs a finite number")
            labels.append(float(label))
        elif str(label) in ids:
            labels.append(ids[str(label)])
        else:
            raise InputError(f"{where} is {label!r}; the classes are {', '.join(ids)}")
    return Dataset.from_dict(texts | {task.label_column: labels})


def _of_text(columns: Columns) -> list[str]:
    """Names of the columns that hold a text."""
    return [n for n, values in columns.items() if any(isinstance(v, str) for v in values)]


def _is_missing(label: object) -> bool:
    return label is None or label == ""
