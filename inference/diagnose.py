"""Diagnose a posterior: `bayes-lora diagnose RUN [RUN ...]`, as text, JSON and report.html."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayes_lora.errors import InputError
from bayes_lora.gates import STRUCTURES
from bayes_lora.inference.bundle import InferenceData, compare, read_bundle
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.diagnosis import MASS, diagnose
from bayes_lora.inference.files import write_text
from bayes_lora.inference.report import report
from bayes_lora.inference.table import short_names
from bayes_lora.targets import LayerSpec

GROUPS = {
    "posterior", "prior", "log_likelihood", "observed_data", "sample_stats", "predictions",
    "predictions_constant_data",
}  # fmt: skip
STATS = {"log_p", "log_q", "log_likelihood", "kl_adapter_weights", "bops_cost", "phase"}
ATTRIBUTES = {
    "task", "rank_structure", "training_examples", "weight_posterior", "weight_temperature",
}  # fmt: skip


COMPARISON = (
    "Expected log predictive density by PSIS-LOO on training examples. The weights were fitted to "
    "these very examples and are held: a run that overfits more can look better here."
)
COUNTED = {"rank": "layers", "bit": "tensors"}


def text(found: dict[str, Any]) -> str:
    """The diagnostics as text, one line a layer."""
    run, lines = found["run"], []
    share = run["relative_bops"]
    lines.append(f"{run['task']}: {run['chains']} chain(s) of {run['draws']} draws")
    lines.append(
        f"Bit operations: {share['mean']:.2%} of 32 x 32 bits (prior {share['prior_mean']:.2%})"
    )
    lines.append(f"PSIS k-hat of the guide: {run['pareto_k_verdict']}")
    when = "when gates were last sampled" if run["gates"] else "at the end"
    lines.append(
        f"ELBO of the first chain {when}, nats: "
        + ", ".join(f"{n} {v:,.0f}" for n, v in run["elbo_terms_nats"].items())
    )
    if run["weight_posterior"] == "delta":
        lines.append(
            "(The weights are a point: their KL is minus its log prior density, nearly all of it "
            "the constant log(scale) + 0.92 nats a weight.)"
        )
    for name, gates in run["gates"].items():
        lines.append(
            f"{name} gates: {gates['all']}, fixed open {gates['fixed_open']}, fixed closed "
            f"{gates['fixed_closed']}, as they would be without data {gates['unmoved']}"
        )
        if never := gates["never_trained"]:
            lines.append(
                f"{name} gates: in {never} of the {COUNTED[name]} they are where training began: "
                "they had too few steps, and agreement of restarts means nothing"
            )
    for name, agreement in run.get("restarts", {}).items():
        lines.append(
            f"restarts, {name}: total variation {agreement['mean_distance']:.3f} (largest "
            f"{agreement['largest_distance']:.3f}), {agreement['decided_alike']:.0%} decided alike"
        )
    for layer, why in run.get("collapsed", {}).items():
        prior, posterior = why["prior_log_odds"], why["posterior_log_odds"]
        margin = 2 * why["prior_log_odds_error"]
        cause = "as in the prior, as far as its draws tell"
        if abs(posterior - prior) > margin:
            against = posterior < prior
            cause = "the data speak against it" if against else "prior and price outweigh it"
        lines.append(
            f"{layer}: rank 0 with probability {why['probability']:.2f}; log odds of any rank "
            f"{prior:+.1f} ± {margin:.1f} a priori, {posterior:+.1f} a posteriori: {cause}"
        )
    if table := _table(found["layers"]):
        lines += [
            "",
            f"Rank and bits: mean, {MASS:.0%} highest-density interval, prior mean",
            *table,
            "P(rank <= k) and P(bits = b) of every layer are in diagnosis.json and report.html",
        ]
    return "\n".join(lines)


def _table(layers: dict[str, Any]) -> list[str]:
    """One line a layer, in columns; none without gates."""
    if not layers:
        return []
    rows = []
    names = short_names([LayerSpec(layer, 0, 0) for layer in layers])
    for layer, parts in zip(names, layers.values(), strict=True):
        cells = {"rank": parts["rank"]} if "rank" in parts else {}
        cells |= parts.get("bits", {})
        described = (
            f"{n} {c['mean']:.1f} [{c['hdi'][0]}, {c['hdi'][1]}] ({c['prior_mean']:.1f})"
            for n, c in cells.items()
        )
        rows.append([layer, *described])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def load(run: str) -> InferenceData:
    """Read a run's bundle.

    Raises
    ------
    InputError
        If the folder holds none, or it cannot be read.
    """
    path = Path(run) / "posterior.nc"
    if Path(run).name == path.name:
        raise InputError(f"name the folder of the run, {Path(run).parent}, not a file in it")
    if not path.is_file():
        raise InputError(
            f"{run} holds no posterior.nc: name a folder that bayes-lora finetune wrote"
        )
    try:
        bundle = read_bundle(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    known = bundle.groups(), bundle.attrs, bundle.get("sample_stats", ())
    if not all(
        needed <= set(names)
        for names, needed in zip(known, (GROUPS, ATTRIBUTES, STATS), strict=True)
    ):
        raise InputError(
            f"{path} is no whole bundle of this version: run bayes-lora finetune again"
        )
    stats = bundle["sample_stats"]
    checked = [n for n in stats if n in ("log_p", "log_q") or str(n).endswith("probability")]
    if bundle.attrs["rank_structure"] not in STRUCTURES or not all(
        np.isfinite(part[name]).all()
        for part, names in ((stats, checked), (bundle["predictions"], bundle["predictions"]))
        for name in names
    ):
        raise InputError(f"{path} holds numbers that are not finite, or an unknown rank_structure")
    return bundle


def run(arguments: Sequence[str] | None = None) -> None:
    """Diagnose the runs that the command line names; write diagnosis.json and report.html."""
    parser = Parser(
        prog="bayes-lora diagnose",
        description="How sure the posterior of a run is, and whether to believe it: as text, in "
        "diagnosis.json and report.html in its folder. Several runs are compared as well.",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="+", help="output folder of bayes-lora finetune")
    folders = parser.parse_args(arguments).run
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError("a run is named twice")
    bundles = {folder: load(folder) for folder in folders}
    for folder, bundle in bundles.items():
        found = diagnose(bundle)
        others = {name: other for name, other in bundles.items() if name != folder}
        found["beside"] = {
            name: beside(folder, bundle, name, other) for name, other in others.items()
        }
        description = text(found)
        page = report(folder, bundle, description, found, others)
        try:
            content = json.dumps(found, indent=2, allow_nan=False)
            write_text(Path(folder) / "diagnosis.json", content + "\n")
            write_text(Path(folder) / "report.html", page)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from error
        print(description)
        for name, comparison in found["beside"].items():
            print(f"\nBeside {name}\n{comparison}")
        print(f"Diagnosis and report are in {folder}\n")


def beside(name: str, bundle: InferenceData, other: str, theirs: InferenceData) -> str:
    """The comparison of two runs as a table, or why there is none."""
    try:
        return f"{compare({name: bundle, other: theirs})}\n{COMPARISON}"
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
