"""Predict a file: `bayes-lora predict RUN --input FILE.jsonl --output FILE.jsonl [--draws S]`.

One output row for every input row, in the same order, written as it goes: `line` (of the input,
from 1), `label`, `probability`, and entropies in nats, what the data and what the posterior leave
open (`predictive.py`); in regression `label` and variances, of a language model the log probability
of the text. A row that cannot be read has an `error` instead. Paths of images are relative to the
input. Only some rows are in memory at a time. Until all are finished they are in FILE.partial,
where the same command goes on after it was stopped. Several processes share the rows
(`accelerate launch -m bayes_lora.inference.predict_file`), and the main one writes them all.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from bayes_lora.errors import InputError
from bayes_lora.inference import processes
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.files import write_text
from bayes_lora.inference.images import why_unreadable
from bayes_lora.inference.loading import FineTuned, load
from bayes_lora.inference.manifest import NAME as MANIFEST
from bayes_lora.inference.quiet import quiet
from bayes_lora.inference.rows import SUFFIXES, Row, read_rows

CHUNK = 256  # rows in memory at a time, and between two writes
SHOWN = 20  # rows that could not be read
_OF_CLASSES = ("label", "probability", "entropy", "entropy_data", "entropy_posterior")
_OF_TEXTS = ("log_probability", "deviation_posterior", "tokens")
FIELDS = {
    "classification": _OF_CLASSES,
    "image_classification": _OF_CLASSES,
    "regression": ("label", "variance", "variance_data", "variance_posterior"),
    "causal_lm": _OF_TEXTS,
    "seq2seq_lm": _OF_TEXTS,
}
"""Columns of the output, by `Task.problem`."""


def answers(model: FineTuned, rows: Sequence[Row], draws: int, seed: int) -> list[dict[str, Any]]:
    """Output rows for input rows, in their order."""
    good = [row.texts for row in rows if not row.error]
    columns: dict[str, list[Any]] = {}
    if good:
        texts: list[Any] = good if len(good[0]) == 2 else [text for (text,) in good]
        found = model.predict(texts, draws, seed)
        columns = {name: values.tolist() for name, values in found.items() if values.ndim == 1}
    values = zip(*columns.values(), strict=True)
    return [
        {"line": row.line, "error": row.error}
        if row.error
        else {"line": row.line} | dict(zip(columns, next(values), strict=True))
        for row in rows
    ]


def predict_file(
    model: FineTuned, source: Path, target: Path, draws: int = 0, seed: int = 0
) -> tuple[int, int, list[Row]]:
    """Predict all rows of a file.

    Parameters
    ----------
    model : FineTuned
        As from `load`.
    source, target : Path
        Input and output, each .jsonl or .csv.
    draws, seed : int
        As of `FineTuned.predict`.

    Returns
    -------
    tuple of int, int and list of Row
        How many rows there are, how many could not be read, and the first of these.

    Raises
    ------
    InputError
        If the input cannot be read, or lacks a column, or the .partial file is of something else.
    """
    partial = target.with_name(target.name + ".partial")
    settings = target.with_name(target.name + ".settings")
    parts = ("decision.json", "guide.safetensors", "head.safetensors", MANIFEST)
    read = [source, *(path for name in parts if (path := model.folder / name).exists())]
    mine = json.dumps(
        [[str(path), path.stat().st_mtime_ns] for path in read]
        + [draws, seed, version("bayes-lora")]
    )
    if partial.exists() and (not settings.exists() or settings.read_text() != mine):
        raise InputError(
            f"{partial} is of another command, or of another state of the input or the run: "
            "remove it, or name another output"
        )
    names = ["line", *FIELDS[model.task.problem], "error"]
    bad, first = 0, []

    def watched(rows: Iterator[Row]) -> Iterator[Row]:
        nonlocal bad
        for row in rows:
            if model.task.has_images and not row.error:
                path = str(source.parent / row.texts[0])
                row = Row(row.line, (path,), why_unreadable(path))
            if row.error:
                bad += 1
                first.append(row) if bad <= SHOWN else None
            yield row

    main, at_once = processes.is_main(), CHUNK * processes.state().num_processes
    processes.wait()  # all have looked at the partial file: now it may change
    try:
        write_text(settings, mine)
        # a byte that is not UTF-8 spoils its row, not the file
        with (
            source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
            (partial if main else Path(os.devnull)).open("a+", encoding="utf-8", newline="") as out,
        ):
            rows = watched(read_rows(file, source.suffix, model.task.given_columns))
            total = processes.of_main(_finished(out, target.suffix == ".csv") if main else 0)
            for _ in islice(rows, total):
                pass
            if not out.tell() and target.suffix == ".csv":
                csv.DictWriter(out, names, lineterminator="\n").writeheader()
            with tqdm(initial=total, unit="row", disable=None if main else True) as progress:
                while chunk := list(islice(rows, at_once)):
                    found = answers(model, chunk, draws, seed)
                    if target.suffix == ".csv":
                        csv.DictWriter(out, names, lineterminator="\n").writerows(found)
                    else:
                        out.writelines(json.dumps(answer) + "\n" for answer in found)
                    out.flush()
                    total += len(chunk)
                    progress.update(len(chunk))
        if main:
            os.replace(partial, target)
    except OSError as error:
        raise InputError(f"cannot read {source} or write {target}: {error.strerror}") from error
    finally:
        if main and partial.is_file() and not partial.stat().st_size:  # nothing to go on with
            partial.unlink()
        if main and settings.is_file() and not partial.exists():
            settings.unlink()
    return total, bad, first


def _finished(out: TextIO, header: bool) -> int:
    """Whole chunks that an earlier command left; what comes after them is cut off."""
    out.seek(0)
    count, quotes, end = -int(header), 0, 0
    while (line := out.readline()).endswith(("\n", "\r")):
        quotes += line.count('"')
        if header and quotes % 2:  # a field of a csv file goes on in the next line
            continue
        count += 1
        if count % CHUNK == 0:
            end = out.tell()
    out.seek(end)
    out.truncate()
    return max(0, count) // CHUNK * CHUNK


def run(arguments: Sequence[str] | None = None) -> None:
    """Predict as the command line says, and report the rows that could not be read."""
    parser = Parser(
        prog="bayes-lora predict", description="Predict the rows of a file.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder that finetune or export wrote")
    parser.add_argument("--input", type=Path, required=True, help=".jsonl or .csv")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl or .csv")
    parser.add_argument(
        "--draws",
        type=int,
        default=0,
        help="of the posterior, to average over; 0: the network as it was decided",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args(arguments)
    for path in (options.input, options.output):
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path}: the name must end in {' or '.join(SUFFIXES)}")
    if options.draws < 0 or not 0 <= options.seed < 2**32:
        raise InputError("draws must be at least 0, and seed from 0 to 4294967295")
    if not options.input.is_file():
        raise InputError(f"there is no file {options.input}; check the path")
    if options.output.is_dir() or options.output.resolve() == options.input.resolve():
        raise InputError(f"{options.output} is a folder, or the input: name another output")
    if options.output.exists() and not options.overwrite:
        raise InputError(f"{options.output} is there already: replace it with --overwrite")
    quiet()
    model = load(options.run, processes.state().device)
    if options.draws and model.draw is None:
        raise InputError(f"{options.run} is an export without a posterior: leave out --draws")
    total, bad, first = predict_file(
        model, options.input, options.output, options.draws, options.seed
    )
    main = processes.is_main()
    processes.finish()
    if not main:
        return
    for row in first:
        print(f"{options.input}, line {row.line}: {row.error}", file=sys.stderr)
    if bad > len(first):
        print(f"and {bad - len(first)} more, with their `error` in the output", file=sys.stderr)
    print(f"{total} rows, {bad} of them could not be read, in {options.output}")
    if total and bad == total:
        raise InputError(f"no row of {options.input} could be read")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
