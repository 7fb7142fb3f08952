"""What is wrong with options, columns, texts or labels is one line that says where."""

import pytest

from bayes_lora.errors import InputError
from bayes_lora.inference.config import parse
from bayes_lora.inference.data import DataConfig
from bayes_lora.inference.tasks import TASKS


def rows(*labels, text="a b"):
    return [{"text": text, "label": label} for label in labels]


def test_unknown_task(error_of):
    message = error_of(DataConfig(task="colas"))
    assert "'colas'" in message
    assert all(name in message for name in TASKS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_train_examples": 0}, "max_train_examples is 0"),
        ({"holdout_share": 1.0}, "holdout_share is 1.0"),
        ({"max_train_examples": 1, "holdout_share": 0.9}, "leaves 0 examples to train on"),
        ({"max_length": 7}, "max_length is 7"),
        ({"train_file": "t.csv"}, "give both"),
        ({"validation_file": "v.csv"}, "give both"),
        ({"task": "custom"}, "train_file and validation_file of your own"),
        ({"text_columns": ["sentence"]}, "are for train_file"),
        ({"label_column": "gold"}, "are for train_file"),
        ({"problem": "regression"}, "are for train_file"),
        ({"train_file": "t", "validation_file": "v", "data_dir": "d"}, "excludes data_dir"),
        ({"train_file": "t", "validation_file": "v", "task": "cola"}, "a named task"),
        ({"train_file": "t", "validation_file": "v", "text_columns": list("abc")}, "one or two"),
        ({"train_file": "t", "validation_file": "v", "text_columns": ["label"]}, "label_column"),
        ({"train_file": "t.csv", "validation_file": "v.csv"}, "no file t.csv"),
    ],
)
def test_options_that_do_not_go_together(options, says, error_of):
    assert says in error_of(DataConfig(**options))


@pytest.mark.parametrize(
    ("train", "validation", "options", "says"),
    [
        # columns
        (rows(0, 1), rows(0), {"text_columns": ["txt"]}, "no column 'txt'; it has text, label"),
        (rows(0, 1), rows(0), {"label_column": "y"}, "no column 'y'; it has text, label"),
        (rows(0, 1), [{"text": "a"}], {}, "dev.jsonl has no column 'label'; it has text"),
        ([{"a": "x", "b": "y", "label": 0}], None, {}, "has 2 columns of text"),
        ([{"a": 1, "label": 0}], None, {}, "has 0 columns of text"),
        # texts
        ([*rows(0, 1), *rows(1, text=7)], None, {}, "train.jsonl, row 3: text is 7"),
        (
            rows(0, 1),
            [*rows(0), {"label": 1, "text": None}],
            {},
            "dev.jsonl, row 2: text is missing",
        ),
        # labels
        (rows(0, 1, None), None, {}, "train.jsonl, row 3: label is missing"),
        (rows("a", "b"), rows("a", ""), {}, "dev.jsonl, row 2: label is missing"),
        (
            rows("a", "b"),
            rows("a", "c"),
            {},
            "dev.jsonl, row 2: label is 'c'; the classes are a, b",
        ),
        (rows(0, 1), rows(1, 0, 2), {}, "dev.jsonl, row 3: label is 2; the classes are 0, 1"),
        (rows(0, "a"), None, {}, "labels must be all numbers or all texts"),
        (rows("a", "a"), None, {}, "has 1 classes"),
        (rows(0.5, "a"), None, {}, "train.jsonl, row 2: label is 'a'; regression needs"),
        (rows(0.5, True), None, {}, "train.jsonl, row 2: label is True; regression needs"),
        (
            rows(0.5, 1.5),
            rows(float("nan")),
            {},
            "dev.jsonl, row 1: label is nan; regression needs",
        ),
        (rows(0.5, None), None, {}, "train.jsonl, row 2: label is missing"),
    ],
)
def test_examples_that_will_not_do(custom, train, validation, options, says, error_of):
    assert says in error_of(custom(train, validation, **options))


def test_labels_of_a_known_task_are_its_ids(tmp_path, write, error_of):
    write(tmp_path / "cola" / "train.jsonl", [{"sentence": "a", "label": y} for y in (0, 1, 2)])
    write(tmp_path / "cola" / "validation.jsonl", [{"sentence": "a", "label": -1}])
    config = DataConfig(task="cola", data_dir=str(tmp_path))
    assert "train.jsonl, row 3: label is 2; the classes are 0, 1" in error_of(config)
    write(tmp_path / "cola" / "train.jsonl", [{"sentence": "a", "label": 1}])
    assert "validation.jsonl, row 1: label is -1" in error_of(config)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (rows(0, 1, text="\ud800"), "row 1: text is not UTF-8"),
        (rows("x", "y", float("nan")), "row 3: label is nan; the classes are x, y"),
        (rows(0.5, 1e39), "row 2: label is 1e+39; regression needs"),
        (rows(0.5, 10**400), "row 2: label is 1000"),
    ],
)
def test_values_that_no_number_or_text_can_hold(train, says, custom, error_of):
    assert says in error_of(custom(train, rows("x", "y")))


def test_what_is_nested_too_deep_to_be_read(tmp_path, error_of):
    deep = "[" * 100_000
    (tmp_path / "a.jsonl").write_text(deep)
    (tmp_path / "c.yaml").write_text(deep)
    files = dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "a.jsonl"))
    assert "line 1 is not JSON" in error_of(DataConfig(**files))
    with pytest.raises(InputError, match="cannot read --config"):
        parse(["--config", str(tmp_path / "c.yaml")])
