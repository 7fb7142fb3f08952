"""Score against bit operations: `bayes-lora frontier --prices 100 1000 10000 --output_dir OUT`.

Trains at every price, with every seed, in a process of its own; what is finished is not trained
again. OUT/price-P/seed-S holds a run; frontier.csv all runs, one a line, and frontier.png their
scores against the bit operations of the decision. Other options are those of `finetune`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bayes_lora.errors import InputError
from bayes_lora.inference.cells import in_a_process, refuse
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.config import parse
from bayes_lora.inference.files import write_figure, write_text

COLUMNS = (
    "score", "nll", "ece", "averaged_nll", "averaged_ece", "relative_bops_32", "relative_bops_16",
    "expected_bops", "mean_rank", "mean_bits_weight", "mean_bits_input", "seconds",
)  # fmt: skip
PRICES = (100.0, 300.0, 1000.0, 3000.0, 10000.0)


def run(arguments: Sequence[str] | None = None) -> None:
    """Train at all prices that the command line names; write table and picture."""
    parser = Parser(
        prog="bayes-lora frontier",
        description="Score against bit operations; other options are those of bayes-lora finetune.",
        allow_abbrev=False,
    )
    help_prices = f"nats that all bit operations are worth; default: {PRICES}"
    parser.add_argument("--prices", nargs="+", type=float, default=PRICES, help=help_prices)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    options, words = parser.parse_known_args(arguments)
    refuse(words, {"price": "--prices", "target_bops": "--prices", "seed": "--seeds"})
    for price in options.prices:  # a wrong option is an error before anything is trained
        config = parse([*words, "--price", str(price), "--output_dir", "x"])
    method = config.posterior.method
    if method == "lora":
        raise InputError("a frontier needs gates: choose another method than lora")
    rows = []
    for seed in options.seeds:
        for price in sorted(options.prices):
            mine = [*words, "--price", str(price), "--seed", str(seed)]
            folder = options.output_dir / f"price-{price:g}" / f"seed-{seed}"
            metrics = in_a_process(method, mine, folder)
            rows.append(
                {"price": price, "seed": seed}
                | {name: metrics[name] for name in COLUMNS if name in metrics}
            )
            found = pd.DataFrame(rows)
            write_text(options.output_dir / "frontier.csv", found.to_csv(index=False))
            write_figure(options.output_dir / "frontier.png", plot_frontier(found))
    print(found.groupby("price").mean().drop(columns="seed").round(4).to_string())
    print(f"Results are in {options.output_dir}")


def plot_frontier(runs: pd.DataFrame) -> Figure:
    """Score against bit operations of the decision, a point a price; standard deviation over seeds.

    Parameters
    ----------
    runs : DataFrame
        Columns `price`, `score` and `relative_bops_32`; one row a run.
    """
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axis = figure.subplots()
    prices = sorted(set(runs["price"]))
    scores = [runs["score"][runs["price"] == price].to_numpy() for price in prices]
    shares = [runs["relative_bops_32"][runs["price"] == price].mean() for price in prices]
    share, score = 100 * np.array(shares), np.array([s.mean() for s in scores])
    bars = None if max(map(len, scores)) < 2 else [s.std(ddof=len(s) > 1) for s in scores]
    axis.errorbar(share, score, yerr=bars, marker="o", capsize=2)
    for price, x, y in zip(prices, share, score, strict=True):
        axis.annotate(f"{price:g}", (x, y), (4, 5), textcoords="offset points", fontsize=8)
    ticks = [
        t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if share.min() / 1.5 < t < share.max() * 1.5
    ]
    axis.set(xscale="log", xlabel="bit operations of the decision, % of 32 x 32", ylabel="score")
    axis.set_xlim(share.min() / 1.3, share.max() * 1.4)
    axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.margins(y=0.12)
    axis.minorticks_off()
    fourfold = (lambda x: np.multiply(x, 4.0), lambda x: np.divide(x, 4.0))
    top = axis.secondary_xaxis("top", functions=fourfold)
    top.set_xticks([4 * tick for tick in ticks], labels=[f"{4 * tick:g}" for tick in ticks])
    top.set_xlabel("% of 16 x 16")
    top.minorticks_off()
    axis.text(0.98, 0.03, "labels: price, nats", transform=axis.transAxes, ha="right", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
