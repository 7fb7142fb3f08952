"""Configurations and data files that nobody would write are read, or refused in one line."""

import json
from dataclasses import fields
from typing import get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bayes_lora.errors import InputError
from bayes_lora.inference.config import FinetuneConfig, parse
from bayes_lora.inference.data import DataConfig, load_task

quick = settings(
    max_examples=80, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # files are written anew
)  # fmt: skip

NAMES = [f.name for part in get_type_hints(FinetuneConfig).values() for f in fields(part)]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["mrpc", "qr", "bf16", "1e-3", "-1", "0.5", "nan", "inf", "no", "~", "[1"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)  # fmt: skip


def refused(function, *arguments):
    """Call it; whatever it raises must be of wrong input, in one line."""
    said = "nothing"
    try:
        function(*arguments)
    except InputError as error:
        said = str(error)
    assert len(said.splitlines()) == 1


@quick
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=4))
def test_configurations_of_any_values(tmp_path, options):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    refused(parse, ["--config", str(path), "--task", "mrpc", "--output_dir", "out"])


@quick
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_configurations_of_any_bytes(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    refused(parse, ["--config", str(path), "--task", "mrpc", "--output_dir", "out"])


@quick
@given(st.lists(st.sampled_from([f"--{name}" for name in NAMES]) | st.text(max_size=8), max_size=5))
def test_command_lines_of_any_words(words):
    refused(parse, ["--output_dir", "out", *words])


ROWS = st.lists(
    st.dictionaries(st.sampled_from(["text", "label", "other"]), VALUES, max_size=3)
    | st.fixed_dictionaries({"text": st.text(max_size=9), "label": st.integers(0, 2)}),
    max_size=6,
)


@quick
@given(ROWS, ROWS)
def test_examples_of_any_values(tmp_path, train, validation):
    paths = []
    for name, rows in (("train", train), ("validation", validation)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    refused(load_task, two_files(paths), 0)


@quick
@given(st.binary(max_size=80), st.sampled_from(["jsonl", "csv"]))
def test_data_files_of_any_bytes(tmp_path, content, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    refused(load_task, two_files([path, path]), 0)


def two_files(paths):
    train, validation = map(str, paths)
    return DataConfig(train_file=train, validation_file=validation, text_columns=["text"])


def test_the_fuzz_reaches_what_is_right(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": k % 2}) + "\n" for k in range(6)))
    task, train, _ = load_task(two_files([path, path]), 0)
    assert (task.num_labels, len(train)) == (2, 6)
    with pytest.raises(InputError, match="unrecognized"):
        parse(["--nothing", "--output_dir", "out"])
