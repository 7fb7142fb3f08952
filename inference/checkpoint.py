"""Checkpoints of a training: folders that are whole or absent, of which the last few are kept.

    OUT/checkpoints/step-120/state.safetensors    tensors
                             state.json           numbers, the run they are of, and a digest
                    step-120-refined-7            after 7 iterations of the refinement

A checkpoint is written under another name, flushed to the disk, and then renamed; so whenever the
process is killed, what has the name of a checkpoint is one. The digest tells if a file was damaged
later. The run, its options and its data, tells a checkpoint that is of another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load, save
from torch import Tensor, nn

from bayes_lora.errors import InputError
from bayes_lora.inference import processes
from bayes_lora.inference.config import FinetuneConfig
from bayes_lora.inference.images import PATHS
from bayes_lora.models.priors import Priors

Run = Mapping[str, Any]
"""What a checkpoint is of: every option that matters by name, and a digest of the data."""


OTHER = {"data": "other data", "frozen": "another backbone"}
"""What of a run is told by a digest."""

CHECKPOINTS = "checkpoints"
"""Folder of all checkpoints in that of the run."""

NAME = re.compile(r"step-(\d+)(?:-refined-(\d+))?")

ANY_VALUE = {
    "output_dir", "overwrite", "resume", "restarts", "prior_predictive",
    "save_minutes", "save_steps", "save_total_limit",
}  # fmt: skip
"""Options that may differ when a training goes on."""


class Checkpoint(NamedTuple):
    """A state of training.

    Attributes
    ----------
    tensors, numbers : dict
        As of `state.py`, and whatever else was kept.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class Keeper:
    """Writes checkpoints when they are due.

    Parameters
    ----------
    folder : Path
        Of all checkpoints of the run; made with the first one.
    run : mapping
        What they are of.
    steps : int or None
        Steps from one checkpoint to the next; None counts minutes alone.
    minutes : float
        Minutes from one checkpoint to the next, at most.
    limit : int
        How many are kept.
    """

    def __init__(
        self, folder: Path, run: Run, steps: int | None, minutes: float, limit: int
    ) -> None:
        self.folder, self.run = folder, run
        self.steps, self.minutes, self.limit = steps, minutes, limit
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, after so many steps."""
        late = time.monotonic() - self._last >= 60 * self.minutes
        return late or (self.steps is not None and step % self.steps == 0)

    def keep(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and remove those that are too many.

        Raises
        ------
        InputError
            If it cannot be written; what was there stays.
        """
        self._last = time.monotonic()
        if not processes.is_main():
            return
        try:
            _write(self.folder, checkpoint, self.run)
        except OSError as error:
            raise InputError(
                f"cannot write a checkpoint to {self.folder}: {error.strerror}; the last one is "
                "whole: mend that, and go on with --resume"
            ) from error
        # one of a later step was refused, so it is not one of those that are kept
        mine = [p for p in found(self.folder) if _place(p.name) <= _place(_name(checkpoint))]
        for old in mine[: -self.limit]:
            shutil.rmtree(old)

    def clear(self) -> None:
        """Remove all checkpoints: the run is finished."""
        if processes.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last one at the end."""
    paths = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: _place(path.name))


def _name(checkpoint: Checkpoint) -> str:
    step, refined = checkpoint.numbers["step"], checkpoint.numbers["refined"]
    return f"step-{step}-refined-{refined}" if refined else f"step-{step}"


def _place(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in NAME.fullmatch(name).groups(0))  # type: ignore[union-attr]


def last_checkpoint(folder: Path, run: Run) -> Checkpoint | None:
    """Read the last checkpoint of this run that is whole; None if there has been none.

    One that is damaged, or of another run, is named on standard error, and the one before it taken.

    Raises
    ------
    InputError
        If none is whole and of this run.
    """
    checkpoints = found(folder)
    foreign: list[str] = []
    for path in reversed(checkpoints):
        try:
            checkpoint, of = _read(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            print(f"bayes-lora: {path} is damaged ({error}): it is left out", file=sys.stderr)
            continue
        other = next((name for name in run if run[name] != of.get(name)), None)
        if other is None:
            for what in foreign:
                print(f"bayes-lora: {what}: it is left out", file=sys.stderr)
            return checkpoint
        foreign.append(
            f"{path} is of {OTHER[other]}"
            if other in OTHER
            else f"{path} was made with {other} {of.get(other)}, not {run[other]}"
        )
    if foreign:
        raise InputError(f"{foreign[0]}: give the same as then, or another --output_dir")
    if checkpoints:
        raise InputError(f"no checkpoint in {folder} is whole: train anew, with --overwrite")
    return None


def identity(config: FinetuneConfig, priors: Priors, data: Dataset, model: nn.Module) -> Run:
    """What a checkpoint must be of to go on: options, processes, priors, data, frozen weights."""
    options = {k: v for part in vars(config).values() for k, v in asdict(part).items()}
    options = {k: v for k, v in options.items() if k not in ANY_VALUE}
    # where a function lies in memory says nothing of it
    written = re.sub(r" at 0x[0-9a-f]+", "", repr(priors))
    options |= {"processes": processes.state().num_processes}
    digests = {"data": _digest_of(data), "frozen": _digest_of_frozen(model)}
    return dict(json.loads(json.dumps(options)) | {"priors": written} | digests)


@torch.no_grad()
def _digest_of_frozen(model: nn.Module) -> str:
    """Of some entries of every frozen weight, which tell another one and cost little."""
    frozen = [p.flatten() for p in model.parameters() if not p.requires_grad and p.numel()]
    some = [p[:: max(1, len(p) // 64)].float().cpu().numpy().tobytes() for p in frozen]
    return _digest(*some)


def _digest_of(data: Dataset) -> str:
    if PATHS in data.column_names:
        paths = data[PATHS][:]
        read = _digest(*map(str.encode, paths), *(Path(p).read_bytes() for p in paths)).encode()
    else:
        read = _bytes_of(data["input_ids"][:])
    return _digest(read, _bytes_of(data["labels"][:]))


def _bytes_of(values: list[Any]) -> bytes:
    """Numbers, or lists of tokens and their lengths."""
    if values and isinstance(values[0], list):
        tokens = np.fromiter(chain.from_iterable(values), dtype=np.int64)
        return tokens.tobytes() + np.array([len(text) for text in values]).tobytes()
    return np.array(values).tobytes()


def _write(folder: Path, checkpoint: Checkpoint, run: Run) -> None:
    path = folder / _name(checkpoint)
    partial = folder / f".{path.name}.partial"
    tensors = save({n: t.detach().cpu().contiguous() for n, t in checkpoint.tensors.items()})
    state = {"run": dict(run), "numbers": checkpoint.numbers}
    digest = _digest(tensors, json.dumps(state).encode())
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _flushed(partial / "state.safetensors", tensors)
        _flushed(partial / "state.json", json.dumps(state | {"digest": digest}).encode())
        _sync(partial)
        if path.exists():  # a training that went on from the one before it
            shutil.rmtree(path)
        partial.rename(path)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(path: Path) -> tuple[Checkpoint, Run]:
    tensors = (path / "state.safetensors").read_bytes()
    state = json.loads((path / "state.json").read_bytes())
    if state.pop("digest") != _digest(tensors, json.dumps(state).encode()):
        raise ValueError("its digest is another")
    return Checkpoint(load(tensors), state["numbers"]), state["run"]


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
