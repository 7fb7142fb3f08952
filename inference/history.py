"""The history of a run: one line a step, written as the run goes."""

from __future__ import annotations

import csv
import os
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from bayes_lora.errors import InputError
from bayes_lora.inference import processes
from bayes_lora.inference.checkpoint import Checkpoint
from bayes_lora.inference.elbo import KL_TERMS, prior_cost
from bayes_lora.inference.files import write_whole
from bayes_lora.inference.train import Record, gate_state, on_host, record_step
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates

COLUMNS = (
    "step", "phase", "kl_weight", "loss", "log_likelihood", *KL_TERMS, "energy",
    "price", "expected_bops", "decided_bops", "mean_open_rank", "mean_open_bits",
)  # fmt: skip


RECORDED = 400
"""Steps, about, at which the gates of every layer are recorded."""


class History:
    """Every term of the ELBO at every step, in nats per example, kept and written to a file.

    The open probabilities of every gate are kept for some 400 of the steps.

    Parameters
    ----------
    path : Path
        CSV file with the columns `COLUMNS`.
    model, guide : BayesianLoRA, GateGuide
        What is trained.
    steps : int
        How many lines there will be, about.
    after : Checkpoint, optional
        Go on after it: the lines that the file had then are kept.

    Raises
    ------
    InputError
        If the file does not hold the lines to go on after.
    """

    def __init__(
        self,
        path: Path,
        model: BayesianLoRA,
        guide: GateGuide,
        steps: int,
        after: Checkpoint | None = None,
    ) -> None:
        self.model, self.guide = model, guide
        self.records: list[Record] = []
        self.gates: dict[int, Gates] = {}
        if after is not None:
            self.records = _read(path, after.numbers["lines"])
            self.gates = _recorded(after)
        self._every = max(1, steps // RECORDED)
        write_whole(path, self._begin)
        # of several processes the main one alone has a file
        place = path if processes.is_main() else Path(os.devnull)
        self._file = place.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="")

    def _begin(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(self.records)

    def __enter__(self) -> Self:
        """Open; the file is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def add(self, record: Record) -> None:
        """Keep the record of one optimizer step."""
        if len(self.records) % self._every == 0:
            self.gates[len(self.records)] = self.guide.open_probabilities()
        self.records.append(record)
        self._writer.writerow(record)
        self._file.flush()

    def refined(self, terms: dict[str, float]) -> None:
        """Keep one iteration of the refinement, under the number of the step before it."""
        cost = prior_cost(terms, self.model.priors.adapter_weight_temperature)
        nats = {"loss": cost - terms["log_likelihood"]} | terms
        step = int(self.records[-1]["step"]) if self.records else 0
        self.add(record_step(step, "refine", 1.0, nats, self._gates(), self.model))

    def _gates(self) -> dict[str, float]:
        return on_host(gate_state(self.model, self.guide))

    def kept(self) -> Checkpoint:
        """What a checkpoint keeps of it; the file is flushed to the disk."""
        if processes.is_main():
            os.fsync(self._file.fileno())
        tensors = {"history.line": torch.tensor(list(self.gates), dtype=torch.long)}
        for name in Gates._fields:
            recorded = [getattr(gates, name) for gates in self.gates.values()]
            if recorded and recorded[0] is not None:
                tensors[f"history.{name}"] = torch.stack(recorded)
        return Checkpoint(tensors, {"lines": len(self.records)})

    def traces(self) -> dict[str, NDArray[np.floating]]:
        """Every number of the history by name, one an entry a line; terms of the ELBO in nats.

        `objective` is minus the loss: divergences have the KL weight of the step, and that of the
        adapter weights its temperature. `elbo` has all of them at weight one; where gates are held,
        open or at the decision, a model that has gates has none (not a number).
        """
        names = [name for name in COLUMNS if name not in ("step", "phase", "loss")]
        found = {name: [record.get(name, np.nan) for record in self.records] for name in names}
        found["objective"] = [-float(record["loss"]) for record in self.records]
        gates = [name for name in KL_TERMS[1:] if any(name in record for record in self.records)]
        found["elbo"] = [
            float(record["log_likelihood"]) - prior_cost(_terms(record), temperature=1.0)
            if all(name in record for name in gates)
            else np.nan
            for record in self.records
        ]
        nats = {"objective", "elbo", "log_likelihood", *KL_TERMS, "energy"}
        sizes = {name: self.model.num_examples if name in nats else 1 for name in found}
        return {name: np.array(v, dtype=float) * sizes[name] for name, v in found.items()}

    def last(self, steps: int) -> dict[str, float]:
        """Terms of the ELBO at the end, nats.

        The log likelihood is the mean of the last `steps`, as far as they are of one phase, with
        dropout; the other terms are those of the last step that had them. Price and bit
        operations are those of model and guide as they are.
        """
        size, final = self.model.num_examples, self.records[-1]
        last = [record for record in self.records[-steps:] if record["phase"] == final["phase"]]
        ends = [float(record["log_likelihood"]) for record in last]
        latest = {k: v for record in self.records for k, v in record.items()}
        gates = record_step(0, "", 1.0, {}, self._gates(), self.model)
        kept = ("price", "expected_bops") if self.model.gated else ()
        return {
            "log_likelihood": sum(ends) / len(ends) * size,
            **{k: float(latest[k]) * size for k in (*KL_TERMS, "energy") if k in latest},
            **{k: float(gates[k]) for k in kept},
        }


def _read(path: Path, lines: int) -> list[Record]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(islice(csv.DictReader(file), lines))
        convert = {"step": int, "phase": str}
        records = [{k: convert.get(k, float)(v) for k, v in row.items() if v} for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {path} ({error}): train anew, with --overwrite") from error
    if len(records) < lines:
        raise InputError(f"{path} has lost lines: train anew, with --overwrite")
    return records


def _recorded(after: Checkpoint) -> dict[int, Gates]:
    gates = {n: after.tensors.get(f"history.{n}") for n in Gates._fields}
    return {
        line: Gates(**{n: None if kept is None else kept[i] for n, kept in gates.items()})
        for i, line in enumerate(after.tensors["history.line"].tolist())
    }


def _terms(record: Record) -> dict[str, float]:
    return {name: float(record[name]) for name in (*KL_TERMS, "energy") if name in record}
