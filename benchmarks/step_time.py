"""Time and memory of a training step, beside those of LoRA and AdaLoRA in PEFT.

    python benchmarks/step_time.py > benchmarks/step_time.csv

Every variant (`steps.py`) makes one step after the other, in one process, again and again, and
before each one LoRA of PEFT makes its own: the table has the medians of the times, and of the
ratios. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pyro
import torch
from steps import Size, joint_gates, steps_of, times
from tqdm.auto import tqdm

from bayes_lora.inference import cells
from bayes_lora.inference.quiet import quiet
from bayes_lora.models.model import Gates

COLUMNS = "variant", "phase", "tokens", "dtype", "median_s", "ratio_to_peft_lora", "peak_mb"

VARIANTS = {
    "peft_lora": ["open"],
    "peft_adalora": ["open"],
    "lora": ["open"],
    "r": ["joint"],
    "qr_weights": ["decided", "undecided"],
    "qr": ["decided", "undecided", "joint"],
    "residual": ["decided", "undecided", "joint"],
}
"""Every variant and its phases. `qr_weights` quantizes weight, A, e and B alone."""


def peak_memory(
    variant: str, phase: str, size: Size, dtype: torch.dtype, joint: list[Gates]
) -> float:
    """Megabytes that a process takes at most which makes three steps of one kind."""
    quiet()
    step = steps_of(variant, phase, size, dtype, joint[:1])[0]
    for _ in range(3):
        step()
    return cells.peak_memory() / 2**20


def measure(size: Size, dtype: torch.dtype, joint: list[Gates], repeats: int) -> list[list[str]]:
    """Rows of the table for one length and one type."""
    kinds = [(variant, phase) for variant, phases in VARIANTS.items() for phase in phases]
    spawn = multiprocessing.get_context("spawn")
    memory = []
    for cell in tqdm(kinds, desc="memory", disable=None):
        with ProcessPoolExecutor(1, spawn) as pool:
            memory.append(pool.submit(peak_memory, *cell, size, dtype, joint).result())
    found = times([steps_of(*cell, size, dtype, joint) for cell in kinds], repeats)
    name = str(dtype).removeprefix("torch.")
    return [
        [*cell, str(size.tokens), name, f"{seconds:.4f}", f"{ratio:.3f}", f"{peak:.0f}"]
        for cell, (seconds, ratio), peak in zip(kinds, found, memory, strict=True)
    ]


def main() -> None:
    """Print the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(2)
    pyro.settings.set(module_local_params=True)
    quiet()
    joint = joint_gates()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    print("# python benchmarks/step_time.py", *sys.argv[1:])
    writer.writerow(COLUMNS)
    for dtype, tokens in itertools.product(options.dtypes, options.tokens):
        writer.writerows(measure(Size(tokens), getattr(torch, dtype), joint, options.repeats))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
