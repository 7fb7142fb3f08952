"""Read texts from a file row by row; a row that cannot be read is told, and the next one read.

In csv a quote that is not closed takes in the lines behind it. So of several lines that are no csv,
only the first is given up, and the others are read again. (Where a later quote happens to close it,
the lines between are a text of several lines to anybody.)
"""

from __future__ import annotations

import csv
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from bayes_lora.errors import InputError

SUFFIXES = (".jsonl", ".csv")
LONGEST = csv.field_size_limit()  # characters of a csv row of several lines


class Row(NamedTuple):
    """One row of the input: its line, and its texts or what is wrong with it."""

    line: int
    texts: tuple[str, ...]
    error: str = ""


def read_rows(file: TextIO, suffix: str, columns: Sequence[str]) -> Iterator[Row]:
    """Read rows one at a time; blank lines are left out.

    Parameters
    ----------
    file : text file
        Open for reading, with ``newline=""``.
    suffix : str
        `.jsonl`, one object a line, or `.csv`, with a header.
    columns : sequence of str
        Those of the texts.

    Raises
    ------
    InputError
        If a csv file lacks a column, or has it twice.
    """
    if suffix != ".csv":
        return _json_rows(file, columns)
    lines = _Lines(file)
    try:
        header = next(csv.reader(lines, strict=True), [])
    except csv.Error as error:
        raise InputError(f"the header of the input is no csv: {error}") from error
    number = Counter(header)
    for name in columns:
        if not number[name]:
            has = ", ".join(header) or "none"
            raise InputError(f"the input has no column {name!r}, separated by commas; it has {has}")
        if number[name] > 1:
            raise InputError(f"the input has {number[name]} columns {name!r}")
    return _csv_rows(lines, header, columns)


def _json_rows(file: TextIO, columns: Sequence[str]) -> Iterator[Row]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Row(line, (), f"not JSON: {error}")
            continue
        yield _row(line, row, columns, "" if isinstance(row, dict) else "not a JSON object")


class _Lines:
    """Lines of a file, of which those of the last record can be read again."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.again: deque[str] = deque()
        self.record: list[str] = []
        self.size = 0  # characters of it
        self.before = 0  # lines before it

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.record.append(self.again.popleft() if self.again else next(self.file))
        self.size += len(self.record[-1])
        if len(self.record) > 1 and self.size > LONGEST:
            raise csv.Error("a quote is not closed")
        return self.record[-1]

    def start(self) -> None:
        """The last record is read; the next one begins."""
        self.before += len(self.record)
        self.record.clear()
        self.size = 0

    def keep_one(self) -> None:
        """All lines of this record but the first are read again."""
        self.again.extendleft(reversed(self.record[1:]))
        del self.record[1:]


def _csv_rows(lines: _Lines, header: Sequence[str], columns: Sequence[str]) -> Iterator[Row]:
    while True:
        lines.start()
        values: list[str] | None = []
        wrong = ""
        try:
            values = next(csv.reader(lines, strict=True), None)
        except csv.Error as error:
            wrong = f"not csv: {error}"
            lines.keep_one()
        if values is None:
            return
        if not "".join(lines.record).strip():
            continue
        if not wrong and len(values) != len(header):
            wrong = f"{len(values)} values for {len(header)}"
            if len(lines.record) > 1:
                wrong += f", in {len(lines.record)} lines"
        yield _row(lines.before + 1, dict(zip(header, values, strict=False)), columns, wrong)


def _row(line: int, row: Any, columns: Sequence[str], error: str) -> Row:  # noqa: ANN401 (as read)
    if error:
        return Row(line, (), error)
    for name in columns:
        value = row.get(name)
        if not isinstance(value, str):
            return Row(line, (), f"{name} is {'missing' if value is None else 'no text'}")
        if not value.strip():
            return Row(line, (), f"{name} is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return Row(line, (), f"{name} is not UTF-8")
    return Row(line, tuple(row[name] for name in columns))
