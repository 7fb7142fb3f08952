"""The history of a run: one line a step, written as the run goes."""

from __future__ import annotations

import csv
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bayes_lora.inference.elbo import KL_TERMS, prior_cost
from bayes_lora.inference.train import Record, record_step
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
    """

    def __init__(self, path: Path, model: BayesianLoRA, guide: GateGuide, steps: int) -> None:
        self.model, self.guide = model, guide
        self.records: list[Record] = []
        self.gates: dict[int, Gates] = {}
        self._every = max(1, steps // RECORDED)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="")
        self._writer.writeheader()

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
        loss = cost - terms["log_likelihood"]
        step, size = int(self.records[-1]["step"]) if self.records else 0, self.model.num_examples
        self.add(record_step(step, "refine", 1.0, loss / size, terms, self.model, self.guide))

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
        gates = record_step(0, "", 1.0, 0.0, {}, self.model, self.guide)
        kept = ("price", "expected_bops") if self.model.gated else ()
        return {
            "log_likelihood": sum(ends) / len(ends) * size,
            **{k: float(latest[k]) * size for k in (*KL_TERMS, "energy") if k in latest},
            **{k: float(gates[k]) for k in kept},
        }


def _terms(record: Record) -> dict[str, float]:
    return {name: float(record[name]) for name in (*KL_TERMS, "energy") if name in record}
