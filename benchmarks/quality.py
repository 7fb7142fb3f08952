"""Score and bit operations of plain LoRA and of the gated model, over seeds.

    python benchmarks/quality.py --task mrpc --data_dir DIR --output_dir runs/mrpc --seeds 0 1 2

Every cell is one `bayes-lora finetune`; a cell that is finished is not trained again, and must have
been trained with the same options. Options that this script does not know go to finetune.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from bayes_lora.inference.config import FinetuneConfig, parse

COLUMNS = (
    "score", "nll", "ece", "relative_bops_32", "relative_bops_16", "mean_rank",
    "mean_bits_weight", "mean_bits_input", "score_before_settling",
    "averaged_score", "averaged_nll", "averaged_ece",
)  # fmt: skip


def train(method: str, seed: int, folder: Path, options: list[str]) -> dict[str, float]:
    """Metrics of one run, trained now unless they are there."""
    file = folder / "metrics.json"
    words = [*options, "--method", method, "--seed", str(seed), "--output_dir", str(folder)]
    if file.exists() and "averaged_score" in file.read_text(encoding="utf-8"):
        asked = flat(parse(words))
        trained = flat(
            parse(["--config", str(folder / "config.yaml"), "--output_dir", str(folder)])
        )
        # None is what a run resolves
        if other := [k for k, v in asked.items() if v is not None and v != trained[k]]:
            sys.exit(f"{folder} was trained with another {', '.join(other)}: choose an output_dir")
    else:
        command = [sys.executable, "-m", "bayes_lora.inference.finetune", *words, "--overwrite"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def flat(config: FinetuneConfig) -> dict[str, object]:
    """All options by name."""
    return {k: v for part in vars(config).values() for k, v in asdict(part).items()}


def summary(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, as far as there are."""
    if not values:
        return ""
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def main() -> None:
    """Train all cells, print the table, write it as CSV into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--methods", nargs="+", default=["lora", "qr"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments, options = parser.parse_known_args()
    rows = []
    for seed in arguments.seeds:
        for method in arguments.methods:
            folder = arguments.output_dir / f"{method}-{seed}"
            metrics = train(method, seed, folder, options)
            values = {c: f"{metrics[c]:.6g}" if c in metrics else "" for c in COLUMNS}
            rows.append({"method": method, "seed": str(seed)} | values)
    with (arguments.output_dir / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        file.write(f"# python benchmarks/quality.py {shlex.join(sys.argv[1:])}\n")
        writer = csv.DictWriter(file, ["method", "seed", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"| method | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for method in arguments.methods:
        mine = [row for row in rows if row["method"] == method]
        cells = [[float(row[c]) for row in mine if row[c]] for c in COLUMNS]
        texts = [summary(values) for values in cells]
        print(f"| {method} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
