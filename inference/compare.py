"""Compare methods: `bayes-lora compare --tasks mrpc --methods lora qr --output_dir OUT`.

A cell is one method on one task with one seed, trained in a process of its own; one that is
finished is not trained again. All methods see the same examples in the same order for the same
number of steps. The learning rate of each is the best of a grid, by its score on a fifth of the
training set that is held out, with the first seed; the validation set has no part in that.
(`adalora_published` alone is trained as its authors did, with their settings and epochs.)

OUT/TASK/METHOD/seed-S holds a cell, OUT/TASK/METHOD/rate-R a trial of a learning rate, and
comparison.csv, .md and .png all cells so far. Other options are those of `finetune`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from bayes_lora.errors import InputError
from bayes_lora.inference.cells import FINETUNED, in_a_process
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.comparison import Cell, collect, markdown, plot_comparison, table
from bayes_lora.inference.config import parse
from bayes_lora.inference.files import write_figure, write_text
from bayes_lora.inference.published import BACKBONE, as_published, published_scores

METHODS = (
    "full", "bitfit", "houlsby", "pfeiffer", "lora", "adalora",
    "adalora_published", "lora_8bit", "lora_4bit", *FINETUNED, "lora_svd",
)  # fmt: skip
GRIDS = {"full": (2e-5, 5e-5, 1e-4)}
GRID = (3e-4, 1e-3, 3e-3)  # of all that train few weights
HOLDOUT = 0.2


def best_rate(method: str, words: Sequence[str], folder: Path, rates: Sequence[float]) -> float:
    """The learning rate with the best score on what is held out; of equal ones, the best NLL."""
    if len(rates) == 1:
        return rates[0]
    trials = {
        rate: in_a_process(
            method,
            [*words, "--learning_rate", str(rate), "--holdout_share", str(HOLDOUT)],
            folder / f"rate-{rate:g}",
        )
        for rate in rates
    }
    return max(rates, key=lambda rate: (trials[rate]["score"], -trials[rate]["nll"]))


def run(arguments: Sequence[str] | None = None) -> None:
    """Train all cells that the command line names, and write the tables."""
    parser = Parser(
        prog="bayes-lora compare",
        description="Compare methods; other options are those of bayes-lora finetune.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", required=True, help="as of finetune")
    default = ["lora", "adalora", "lora_8bit", "qr"]
    parser.add_argument("--methods", nargs="+", default=default, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    choice = f"to choose from; default: {GRID}, of full {GRIDS['full']}"
    parser.add_argument("--learning_rates", nargs="+", type=float, help=choice)
    parser.add_argument("--output_dir", type=Path, required=True)
    options, words = parser.parse_known_args(arguments)
    if "lora_svd" in options.methods and not {"lora", "qr"} <= set(options.methods):
        raise InputError("lora_svd cuts lora down to the size of qr: name both methods before it")
    for task in options.tasks:  # a wrong option is an error before anything is trained
        config = parse([*words, "--task", task, "--output_dir", "x"])
        if "adalora_published" in options.methods:
            published_rate([*words, "--task", task])
    beside = BACKBONE in str(config.network.backbone).lower()
    if importlib.util.find_spec("peft") is None and not set(options.methods) <= set(FINETUNED):
        raise InputError("LoRA and AdaLoRA are PEFT's: pip install 'bayes-lora[compare]'")
    out: Path = options.output_dir
    cells: list[Cell] = []
    for seed in options.seeds:
        for task in options.tasks:
            for method in sorted(options.methods, key=METHODS.index):
                folder = out / task / method
                rates = options.learning_rates or GRIDS.get(method, GRID)
                trained_as = "lora" if method == "lora_svd" else method
                mine = [*words, "--task", task]
                first = [*mine, "--seed", str(options.seeds[0])]
                if method == "adalora_published":
                    rates = [published_rate(mine)]
                rate = best_rate(trained_as, first, out / task / trained_as, rates)
                mine += ["--seed", str(seed), "--learning_rate", str(rate)]
                metrics = in_a_process(method, mine, folder / f"seed-{seed}")
                cells.append(Cell(task, method, seed, metrics))
                write(out, cells, options.tasks if beside else ())
    print(markdown(table(collect(cells))))
    print(f"Results are in {out}")


def published_rate(words: Sequence[str]) -> float:
    """The learning rate that AdaLoRA's authors used for the task."""
    config, _ = as_published(parse([*words, "--output_dir", "x"]))
    return config.training.learning_rate


def write(out: Path, cells: Sequence[Cell], published: Sequence[str] = ()) -> None:
    """Write tables and picture of the cells so far, beside them what is published of some tasks."""
    found = collect(cells)
    write_text(out / "comparison.csv", found.to_csv(index=False))
    text = markdown(table(found)) + "\n"
    if published:
        text += "\n" + markdown(published_scores(published)) + "\n"
    write_text(out / "comparison.md", text)
    write_figure(out / "comparison.png", plot_comparison(found))


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
