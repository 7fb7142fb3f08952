"""Diagnose a posterior: `bayes-lora diagnose RUN [RUN ...]`, as text, JSON and report.html."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayes_lora.errors import InputError
from bayes_lora.inference.bundle import InferenceData, compare
from bayes_lora.inference.checked_bundle import checked_bundle
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.description import text
from bayes_lora.inference.diagnosis import diagnose
from bayes_lora.inference.files import write_text
from bayes_lora.inference.report import report

WRITTEN = ("diagnosis.json", "report.html")
COMPARISON = (
    "Expected log predictive density by PSIS-LOO on training examples. The weights were fitted to "
    "these very examples{held}: a run that overfits more can look better here."
)


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
    bundles = {folder: checked_bundle(folder) for folder in folders}
    for path in (Path(folder) / name for folder in folders for name in WRITTEN):
        if path.is_dir():
            raise InputError(f"{path} is a folder: the diagnosis cannot be written there")
    prepared = [_diagnosed(folder, bundles) for folder in folders]
    for folder, (described, *contents) in zip(folders, prepared, strict=True):
        for name, content in zip(WRITTEN, contents, strict=True):
            try:
                write_text(Path(folder) / name, content)
            except OSError as error:
                raise InputError(f"cannot write {Path(folder) / name}: {error.strerror}") from error
        print(f"{described}\nDiagnosis and report are in {folder}\n")


def _diagnosed(folder: str, bundles: Mapping[str, InferenceData]) -> tuple[str, str, str]:
    """What is printed of a run, and what is written as JSON and as HTML."""
    bundle = bundles[folder]
    others = {name: other for name, other in bundles.items() if name != folder}
    found = diagnose(bundle)
    found["beside"] = {name: beside(folder, bundle, name, other) for name, other in others.items()}
    described = text(found)
    page = report(folder, bundle, described, found, others)
    parts = [f"Beside {name}\n{compared['text']}" for name, compared in found["beside"].items()]
    content = json.dumps(found, indent=2, allow_nan=False) + "\n"
    return "\n\n".join([described, *parts]), content, page


def beside(name: str, bundle: InferenceData, other: str, theirs: InferenceData) -> dict[str, Any]:
    """The comparison of two runs as `text`, and as a `table` by run, if they can be compared."""
    try:
        table, words = compare({name: bundle, other: theirs})
    except ValueError as error:
        return {"text": str(error)}
    points = {each.attrs["weight_posterior"] == "delta" for each in (bundle, theirs)}
    held = ", and are held" if points == {True} else ""
    lines = [words]
    for run, row in table.items():
        if share := row["share_of_bad_k"]:
            lines.append(
                f"{run}: Pareto k is above {row['good_k']:.2f} for {share:.0%} of the examples, "
                "whose part of its estimate is not to be relied on"
            )
    return {"text": "\n".join([*lines, COMPARISON.format(held=held)]), "table": table}


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
