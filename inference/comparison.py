"""What a comparison of methods shows: a table of means over seeds, and score against cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

COLUMNS = {
    "score": ("score", ".3f"),
    "nll": ("NLL, nats", ".3f"),
    "ece": ("ECE", ".3f"),
    "averaged_score": ("score, averaged", ".3f"),
    "averaged_nll": ("NLL, averaged", ".3f"),
    "averaged_ece": ("ECE, averaged", ".3f"),
    "trainable_parameters": ("trained", ",.0f"),
    "mean_rank": ("rank", ".1f"),
    "mean_bits_weight": ("bits, weight", ".1f"),
    "mean_bits_input": ("bits, input", ".1f"),
    "relative_bops_32": ("BOPs of 32 x 32", ".1%"),
    "relative_bops_16": ("of 16 x 16", ".1%"),
    "seconds": ("seconds", ".0f"),
    "peak_memory_mb": ("peak MiB", ".0f"),
    "learning_rate": ("rate", "g"),
}
"""Metrics that are shown: their heading, and how they are written."""

OF_ONE_TASK = ("nll", "ece", "averaged_nll", "averaged_ece", "learning_rate")
FIXED = {"trainable_parameters", "learning_rate"}  # the same for all seeds
REFERENCE = "lora"


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed, and its metrics."""

    task: str
    method: str
    seed: int
    metrics: dict[str, float]


def collect(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row a cell: task, method, seed, and the metrics that are shown."""
    rows = [
        {"task": c.task, "method": c.method, "seed": c.seed}
        | {name: c.metrics.get(name, np.nan) for name in COLUMNS}
        for c in cells
    ]
    return pd.DataFrame(rows)


def table(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a task and method: mean ± standard deviation over seeds, and a test against LoRA.

    Parameters
    ----------
    cells : DataFrame
        As of `collect`.

    Returns
    -------
    DataFrame
        Of str. `p` is of a paired two-sided t test of the scores against those of `lora`, over
        the seeds that both have; empty for fewer than two. With several tasks there is also the
        mean over tasks, of the seeds that have all of them; its pairs are these means. Neither
        NLL nor ECE has one, which of classes and of densities are different things.
    """
    rows = []
    tasks = list(dict.fromkeys(cells["task"]))
    for task in [*tasks, *(["mean"] if len(tasks) > 1 else [])]:
        here = _means(cells, len(tasks)) if task == "mean" else cells[cells["task"] == task]
        for method in dict.fromkeys(here["method"]):
            mine = here[here["method"] == method]
            row = {"task": task, "method": method}
            row |= {h: _cell(mine[c], f, c in FIXED) for c, (h, f) in COLUMNS.items()}
            rows.append(row | {"p": _paired(here, method)})
    return pd.DataFrame(rows)


def _means(cells: pd.DataFrame, tasks: int) -> pd.DataFrame:
    """Over the tasks, of every method and seed that has all of them, what has a mean."""
    groups = cells.drop(columns="task").groupby(["method", "seed"], sort=False, as_index=False)
    means = groups.mean()[(groups["score"].count()["score"] == tasks).to_numpy()]
    return means.assign(task="mean", **dict.fromkeys(OF_ONE_TASK, np.nan))


def _cell(values: pd.Series, form: str, fixed: bool) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    mean = format(values.mean(), form)
    return mean if fixed or len(values) < 2 else f"{mean} ± {format(values.std(), form)}"


def _paired(cells: pd.DataFrame, method: str) -> str:
    scores = cells.pivot_table(index=["task", "seed"], columns="method", values="score")
    if method == REFERENCE or REFERENCE not in scores:
        return ""
    pairs = scores[[method, REFERENCE]].dropna()
    if len(pairs) < 2 or (pairs[method] - pairs[REFERENCE]).std() == 0:
        return ""
    return f"{stats.ttest_rel(pairs[method], pairs[REFERENCE]).pvalue:.2g}"


def markdown(rows: pd.DataFrame) -> str:
    """The table in Markdown, without the columns that no method has."""
    kept = rows.loc[:, (rows != "").any()]
    lines = [kept.columns, ["---"] * len(kept.columns), *kept.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot_comparison(cells: pd.DataFrame) -> Figure:
    """Score against bit operations, one panel a task; mean and standard deviation over seeds."""
    tasks = list(dict.fromkeys(cells["task"]))
    methods = list(dict.fromkeys(cells["method"]))
    figure = Figure(figsize=(1.2 + 3.2 * len(tasks), 3.4), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for index, method in enumerate(methods):
            mine = cells[(cells["task"] == task) & (cells["method"] == method)]
            if mine.empty:
                continue
            axis.errorbar(
                100 * mine["relative_bops_32"].mean(), mine["score"].mean(),
                yerr=mine["score"].std() if len(mine) > 1 else None,
                fmt="osD^vPX*<>hp"[index % 12], color=f"C{index % 10}", capsize=2, label=method,
            )  # fmt: skip
        least = 100 * cells["relative_bops_32"].min()
        axis.set(xscale="log", xlim=(least / 1.5, 150), title=task)
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick > least / 1.5]
        axis.set_xticks(ticks, labels=map(str, ticks))
        axis.minorticks_off()
        axis.set_xlabel("bit operations, % of 32 x 32")
    axes[0, 0].set_ylabel("score")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure
