"""Compare methods: `bayes-lora compare --tasks mrpc --methods lora qr --output_dir OUT`.

A cell is one method on one task with one seed, trained in a process of its own; one that is
finished is not trained again. All methods see the same examples in the same order for the same
number of steps. The learning rate of each is the best of a grid, by its score on a fifth of the
training set that is held out, with the first seed; the validation set has no part in that.
(`adalora_published` alone is trained as its authors did, with their settings and epochs.)

OUT/TASK/METHOD/seed-S holds a cell, OUT/TASK/METHOD/rate-R a trial of a learning rate, and
comparison.csv, .md and .png all cells that OUT has with these options, of this command or of
others before it. Other options are those of `finetune`. A trial that leaves the finite numbers is
the worst of its grid.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bayes_lora.errors import InputError, NumericalError
from bayes_lora.inference.cells import FINETUNED, all_finished, in_a_process, refuse
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.comparison import Cell, collect, markdown, plot_comparison, table
from bayes_lora.inference.config import parse
from bayes_lora.inference.data import load_task
from bayes_lora.inference.files import check_free, write_figure, write_text
from bayes_lora.inference.options import data_seed
from bayes_lora.inference.published import BACKBONE, as_published, published_scores

METHODS = (
    "full", "bitfit", "houlsby", "pfeiffer", "lora", "adalora",
    "adalora_published", "lora_8bit", "lora_4bit", *FINETUNED, "lora_svd",
)  # fmt: skip
GRIDS = {"full": (2e-5, 5e-5, 1e-4), "adalora": (1e-3, 3e-3, 1e-2)}
GRID = (3e-4, 1e-3, 3e-3)  # of all others, which train few weights
HOLDOUT = 0.2
CHOSEN = {
    "task": "--tasks", "method": "--methods", "seed": "--seeds", "learning_rate": "--learning_rates"
}  # fmt: skip
"""Options of `finetune` that this command gives itself, and what of its own they follow."""


def best_rate(method: str, words: Sequence[str], folder: Path, rates: Sequence[float]) -> float:
    """The learning rate with the best score on what is held out; of equal ones, the best NLL."""
    if len(rates) == 1:
        return rates[0]
    trials, failed = {}, None
    for rate in rates:
        mine = [*words, "--learning_rate", str(rate), "--holdout_share", str(HOLDOUT)]
        try:
            trials[rate] = in_a_process(method, mine, folder / f"rate-{rate:g}")
        except NumericalError as error:
            print(f"bayes-lora: {method} at {rate:g}: {error}", file=sys.stderr)
            failed = error
    if failed is not None and not trials:
        raise failed
    best = max(trials, key=lambda rate: (trials[rate]["score"], -trials[rate]["nll"]))
    if best in (min(rates), max(rates)):
        edge = f"the best learning rate of {method} is {best:g}, at the edge of its grid"
        print(f"bayes-lora: {edge}: one beyond may be better", file=sys.stderr)
    return best


def run(arguments: Sequence[str] | None = None) -> None:
    """Train all cells that the command line names, and write the tables."""
    parser = Parser(
        prog="bayes-lora compare",
        description="Compare methods; other options are those of bayes-lora finetune.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", required=True, help="as of finetune")
    default = ["lora", "adalora", "lora_8bit", "qr"]
    stated = "default: " + " ".join(default)
    parser.add_argument("--methods", nargs="+", default=default, choices=METHODS, help=stated)
    stated = "the first one also chooses the learning rates; default: 0 1 2"
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help=stated)
    choice = f"to choose from; default: {GRID}, of {GRIDS}"
    parser.add_argument("--learning_rates", nargs="+", type=float, help=choice)
    parser.add_argument("--output_dir", type=Path, required=True)
    options, words = parser.parse_known_args(arguments)
    refuse(words, CHOSEN)
    for name in ("tasks", "methods", "seeds"):
        (most, times), *_ = Counter(getattr(options, name)).most_common(1)
        if times > 1:
            raise InputError(f"--{name} names {most} more than once")
    if "lora_svd" in options.methods and not {"lora", "qr"} <= set(options.methods):
        raise InputError("lora_svd cuts lora down to the size of qr: name both methods before it")
    out: Path = options.output_dir
    check_free(out, (), overwrite=False)
    for task in options.tasks:  # what is wrong is an error before anything is trained
        mine = [*words, "--task", task, "--output_dir", "x"]
        config = parse(mine)
        for name in ("seed", "learning_rate"):
            for value in getattr(options, f"{name}s") or ():
                parse([*mine, f"--{name}", str(value)])
        if "adalora_published" in options.methods:
            published_rate([*words, "--task", task])
        load_task(config.data, data_seed(config.training))
    beside = BACKBONE in str(config.network.backbone).lower()
    if importlib.util.find_spec("peft") is None and not set(options.methods) <= set(FINETUNED):
        raise InputError("LoRA and AdaLoRA are PEFT's: pip install 'bayes-lora[compare]'")
    report = ""
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
                in_a_process(method, mine, folder / f"seed-{seed}")
                report = write(out, cells(out, words, options.tasks), beside)
    print(report, end="")
    print(f"Results are in {out}")


def cells(out: Path, words: Sequence[str], tasks: Sequence[str] = ()) -> list[Cell]:
    """All finished cells in a folder that were trained with these options; some tasks first."""

    def place(cell: Cell) -> tuple[int, str, int, int]:
        known = tasks.index(cell.task) if cell.task in tasks else len(tasks)
        return known, cell.task, METHODS.index(cell.method), cell.seed

    found = [
        Cell(path.parents[1].name, method, seed, metrics)
        for path, method, options, metrics in all_finished(out.glob("*/*/seed-*"))
        if method in METHODS
        and (seed := seed_of(path)) is not None
        # behind them are task, seed and learning rate
        and options[:-6] == list(words)
    ]
    return sorted(found, key=place)


def seed_of(path: Path) -> int | None:
    """Of a cell's folder, if it is one."""
    digits = path.name.removeprefix("seed-")
    return int(digits) if digits.isdecimal() else None


def published_rate(words: Sequence[str]) -> float:
    """The learning rate that AdaLoRA's authors used for the task."""
    config, _ = as_published(parse([*words, "--output_dir", "x"]))
    return config.training.learning_rate


def write(out: Path, cells: Sequence[Cell], beside: bool) -> str:
    """Write tables and picture, and what is published of the tasks; give the text."""
    found = collect(cells)
    write_text(out / "comparison.csv", found.to_csv(index=False))
    text = markdown(table(found)) + "\n"
    if beside:
        text += "\n" + markdown(published_scores(list(dict.fromkeys(found["task"])))) + "\n"
    write_text(out / "comparison.md", text)
    write_figure(out / "comparison.png", plot_comparison(found))
    return text


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
