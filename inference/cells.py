"""One training among several: in a process of its own, and kept once it is finished.

The folder of a cell is that of a run, and holds cell.json besides: method and options, by which a
cell that was trained otherwise is told. A process of its own has a peak memory of its own.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bayes_lora.errors import InputError
from bayes_lora.inference import processes
from bayes_lora.inference.checkpoint import CHECKPOINTS
from bayes_lora.inference.child import in_a_child
from bayes_lora.inference.config import FinetuneConfig, parse
from bayes_lora.inference.files import write_text
from bayes_lora.inference.finetune import finetune
from bayes_lora.inference.quiet import quiet

FINETUNED: dict[str, dict[str, Any]] = {
    "r": {"method": "r"},
    "q": {"method": "q"},
    "qr": {"method": "qr"},
    "lora_normal": {"method": "lora", "weight_posterior": "normal"},
}
"""Methods that are ours, and what each sets of `PosteriorConfig`; the others are baselines."""


def in_a_process(method: str, words: Sequence[str], folder: Path) -> dict[str, float]:
    """Metrics of a cell, trained now unless it is finished.

    Parameters
    ----------
    method : str
        One of `FINETUNED`, or a baseline.
    words : sequence of str
        Options of `bayes-lora finetune`, without the output folder.
    folder : Path
        Of the cell.

    Returns
    -------
    dict of str to float
        What its `metrics.json` holds: also `peak_memory_mb` and `learning_rate`.

    Raises
    ------
    InputError
        If the cell is there, but was trained with other options; if training refuses them; or if
        this is one of several processes.
    NumericalError
        If training leaves the finite numbers.
    Interrupted
        If SIGTERM came; the training is stopped too.
    """
    if processes.state().num_processes > 1:
        raise InputError("cells are trained one after the other: start this without a launcher")
    found = finished(method, words, folder)
    if found is None:
        print(f"{folder}", file=sys.stderr)
        in_a_child(folder, train_cell, method, words, folder)
        found = finished(method, words, folder)
    assert found is not None
    return found


def finished(method: str, words: Sequence[str], folder: Path) -> dict[str, float] | None:
    """Metrics of a cell, or None if it is not trained, or not to its end."""
    found = _read(folder)
    if found is None:
        return None
    cell, metrics = found
    if cell["method"] != method or _config(cell["options"], folder) != _config(words, folder):
        raise InputError(
            f"{folder} was trained with other options ({' '.join(cell['options'])}): "
            "name another --output_dir, or remove that folder"
        )
    return metrics


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, float]] | None:
    try:
        cell = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (cell, metrics) if "peak_memory_mb" in metrics else None


def all_finished(
    folders: Iterable[Path],
) -> Iterator[tuple[Path, str, list[str], dict[str, float]]]:
    """Folder, method, options and metrics of every one of these that is a finished cell."""
    for folder in folders:
        if found := _read(folder):
            yield folder, found[0]["method"], found[0]["options"], found[1]


def refuse(words: Sequence[str], chosen: Mapping[str, str]) -> None:
    """Refuse options that a command gives its cells itself.

    Raises
    ------
    InputError
        If one is among `words`; it says which option of the command is meant.
    """
    names = {word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")}
    for name, instead in chosen.items():
        if name in names:
            raise InputError(f"--{name} is chosen for every cell: give {instead}")
    for name in ("resume", "overwrite"):
        if name in names:
            raise InputError(f"leave --{name} out: what is finished is kept, the rest goes on")


def train_cell(method: str, words: Sequence[str], folder: Path) -> None:
    """Train one cell, in this process; its metrics also say how much memory it took.

    What left a checkpoint goes on after it.
    """
    quiet()
    config = _config(words, folder)
    if method in FINETUNED:
        posterior, training = replace(config.posterior, **FINETUNED[method]), config.training
        if (folder / CHECKPOINTS).exists():
            training = replace(training, overwrite=False, resume=True)
        metrics = finetune(replace(config, posterior=posterior, training=training))
    else:
        from bayes_lora.inference.train_baseline import train_baseline, truncated_lora  # needs PEFT

        if method == "lora_svd":
            metrics = truncated_lora(config, folder.parents[1])
        else:
            metrics = train_baseline(method, config)
    if torch.cuda.is_available():
        metrics["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        metrics["peak_memory_mb"] = peak_memory() / 2**20
    metrics["learning_rate"] = config.training.learning_rate
    cell = {"method": method, "options": list(words)}
    write_text(folder / "cell.json", json.dumps(cell, indent=2) + "\n")
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def peak_memory() -> int:
    """Bytes that this process had in memory at most."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage has on Linux may be of the parent, before this one began
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _config(words: Sequence[str], folder: Path) -> FinetuneConfig:
    return parse([*words, "--output_dir", str(folder), "--overwrite"])
