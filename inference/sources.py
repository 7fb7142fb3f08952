"""Sources of examples: files of one's own, folders laid out as GLUE is, and the hub.

All give columns of plain values, as they are; `tasks.check_examples` says whether they will do.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.csv  # type: ignore[import-untyped]  # it has no types
import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import load_dataset

from bayes_lora.errors import InputError
from bayes_lora.inference.tasks import Columns

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Files that are read: JSON (one object a line), comma- or tab-separated values, Parquet, and lines
of text."""


def find_file(folder: Path, split: str) -> Path:
    """Find the file of a split, whatever its format.

    Raises
    ------
    InputError
        If the folder has none.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     (Path(folder) / "validation.tsv").touch()
    ...     find_file(Path(folder), "validation").name
    'validation.tsv'
    """
    for suffix in SUFFIXES:
        if (file := folder / f"{split}{suffix}").is_file():
            return file
    raise InputError(
        f"there is no {folder / split}.jsonl, nor one that ends in {', '.join(SUFFIXES[1:])}; "
        "data_dir must hold a folder for the task"
    )


def read_file(path: Path) -> Columns:
    """Read a whole file of examples.

    JSON and Parquet say the types of their values. For comma- and tab-separated values they are
    inferred by column, and an empty value is None; quotes in tab-separated files are text, as in
    GLUE's own. Lines of text are a column `text`; blank ones are left out.

    Raises
    ------
    InputError
        If there is no such file, its name says no known format, it cannot be parsed (for JSON the
        message names the line), it has a column twice, or it has no examples.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "train.jsonl"
    ...     _ = path.write_text('{"text": "No .", "label": 0}')
    ...     read_file(path)
    {'text': ['No .'], 'label': [0]}
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path")
    if path.suffix not in SUFFIXES:
        raise InputError(f"cannot read {path}; its name must end in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            columns = pyarrow.parquet.read_table(path).to_pydict()
        elif path.suffix == ".csv":
            quoted = pyarrow.csv.ParseOptions(newlines_in_values=True)
            columns = _read_separated(path, quoted)
        elif path.suffix == ".tsv":
            tabs = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
            columns = _read_separated(path, tabs)
        elif path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            columns = {"text": [line for line in lines if line.strip()]}
        else:
            columns = _read_json_lines(path)
    except (ValueError, OSError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not any(columns.values()):
        raise InputError(f"{path} has no examples; give at least one")
    return columns


def load_glue(task: str) -> list[Columns]:
    """Load training and validation examples of a GLUE task from the hub, or from its cache.

    The client tries a hub that it cannot reach six times, over some 20 seconds; with
    ``HF_HUB_OFFLINE=1`` in the environment it looks into its cache only. MNLI is validated on
    its matched set.

    Raises
    ------
    InputError
        If the hub cannot be reached and the cache does not have the task.
    """
    try:
        data = load_dataset("nyu-mll/glue", task)
    except Exception as error:  # whatever the HTTP library of the hub's client raises
        raise InputError(
            f"cannot load {task} from the hub ({' '.join(str(error).split())[:120]}); "
            "offline, give --data_dir with a copy, or use --task agreement"
        ) from error
    splits = ("train", "validation_matched" if task == "mnli" else "validation")
    return [data[split][:] for split in splits]


def _read_separated(path: Path, options: pyarrow.csv.ParseOptions) -> Columns:
    table = pyarrow.csv.read_csv(path, parse_options=options)
    names = table.column_names
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"it has columns twice: {', '.join(sorted(twice))}; rename one")
    if any(pyarrow.types.is_binary(column.type) for column in table.columns):
        raise ValueError("it is not UTF-8; save it in that encoding")
    return {n: [None if v == "" else v for v in vs] for n, vs in table.to_pydict().items()}


def _read_json_lines(path: Path) -> Columns:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if not isinstance(rows[-1], dict):
            raise ValueError(f"line {number} is not a JSON object; write one example a line")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
