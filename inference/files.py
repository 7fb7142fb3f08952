"""Output folders and files: nothing overwritten without being told to, nothing half written.

Of several processes the main one alone changes anything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure
from safetensors.torch import save
from torch import Tensor

from bayes_lora.errors import InputError
from bayes_lora.inference import processes


def check_free(folder: Path, outputs: Sequence[str], overwrite: bool) -> None:
    """Refuse a folder that already holds a run.

    Raises
    ------
    InputError
        If `folder` is a file, or holds any of `outputs` or a restart, and `overwrite` is off.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file: name a folder")
    found = [name for name in outputs if (folder / name).exists()]
    found += [inner.name for inner in restarts(folder)]
    if found and not overwrite:
        raise InputError(
            f"output_dir {folder} already holds a run ({found[0]}): choose another folder, or "
            "replace the run with --overwrite"
        )


def restarts(folder: Path) -> list[Path]:
    """Folders of the restarts of the run in `folder`, in order."""
    found = [path for path in folder.glob("restart-*") if path.name[8:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[8:]))


def open_folder(folder: Path, outputs: Sequence[str]) -> None:
    """Make the folder, and take out of it what an earlier run of ours left; the rest stays.

    Raises
    ------
    InputError
        If it cannot be written to.
    """
    if not processes.is_main():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in outputs:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            (folder / name).unlink(missing_ok=True)
        for inner in restarts(folder):
            open_folder(inner, outputs)
            if not any(inner.iterdir()):
                inner.rmdir()
    except OSError as error:
        raise InputError(f"cannot write to output_dir {folder}: {error.strerror}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Lend a path to write to; what is written there becomes `path` if nothing goes wrong."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a function write a file, whole or not at all; it is called with a path."""
    if processes.is_main():
        with whole(path) as partial:
            write(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_figure(path: Path, figure: Figure) -> None:
    """Write a PNG picture whole or not at all."""
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=150))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_whole(path, lambda partial: partial.write_bytes(save(found)))  # a full disk: an OSError
