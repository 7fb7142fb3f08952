"""Where the time of a training step goes.

    python benchmarks/step_parts.py > benchmarks/step_parts.csv

The same steps as in `steps.py`, 64 tokens, fp32, 2 threads. `products` are matrix products,
`others` all other operators of torch, `host` is what is left of the step: Python, with Pyro's
handlers, and autograd between operators. `bookkeeping` is no part beside these, but a step of its
own from which the optimizer and the network, with all that it makes of its latents, are left out:
it traces guide and model, draws the gates, computes all divergences and their gradients. Medians;
shares are of the whole step, which the profiler makes slower by some percent.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from statistics import median
from unittest import mock

import pyro
import torch
from steps import Size, Step, steps_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bayes_lora.inference.quiet import quiet
from bayes_lora.models.model import Gates
from bayes_lora.network import AdaptedNetwork

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum", "mkldnn")
# with logits of 0, some two thirds of the draws are undecided
HALF = Gates(torch.full((36, 8), 0.5), torch.full((36, 6, 3), 0.5))  # shapes of MiniLM at rank 8
STEPS = {
    "peft_lora": ("open", Gates()),
    "lora": ("open", Gates()),
    "r": ("joint", HALF._replace(bit_gate=None)),
    "qr": ("joint", HALF),
}
"""Of every variant the phase, and the probabilities of open gates."""


def made(variant: str) -> Step:
    """The step of a variant."""
    phase, at = STEPS[variant]
    return steps_of(variant, phase, Size(), torch.float32, [at])[0]


def parts(step: Step, repeats: int) -> dict[str, float]:
    """Seconds of a step by part, medians."""
    found: dict[str, list[float]] = {"step": [], "products": [], "others": [], "host": []}
    step()
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            step()
            whole = time.perf_counter() - start
        operators = {e.key: e.self_cpu_time_total / 1e6 for e in profiler.key_averages()}
        aten = {k.removeprefix("aten::"): s for k, s in operators.items() if k.startswith("aten::")}
        products = sum(s for k, s in aten.items() if k.startswith(PRODUCTS))
        for name, seconds in (
            ("step", whole), ("products", products), ("others", sum(aten.values()) - products),
            ("host", whole - sum(aten.values())),
        ):  # fmt: skip
            found[name].append(seconds)
    return {name: median(seconds) for name, seconds in found.items()}


def bookkeeping(variant: str, repeats: int) -> float:
    """Seconds of a step without network and optimizer."""
    logits = torch.zeros(32, 2, requires_grad=True)

    def nothing(self: AdaptedNetwork, batch: dict[str, Tensor], latents: object) -> Tensor:
        return logits

    step = made(variant)
    seconds = []
    with (
        mock.patch.object(AdaptedNetwork, "forward", nothing),
        mock.patch.object(torch.optim.AdamW, "step", return_value=None),
    ):
        for _ in range(3 * repeats):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def main() -> None:
    """Print the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(2)
    pyro.settings.set(module_local_params=True)
    quiet()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    print("# python benchmarks/step_parts.py", *sys.argv[1:])
    writer.writerow(["variant", "phase", "part", "median_s", "share"])
    for variant, (phase, _) in STEPS.items():
        found = parts(made(variant), options.repeats)
        if not variant.startswith("peft_"):
            found["bookkeeping"] = bookkeeping(variant, options.repeats)
        for part, seconds in found.items():
            share = f"{seconds / found['step']:.3f}"
            writer.writerow([variant, phase, part, f"{seconds:.4f}", share])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
