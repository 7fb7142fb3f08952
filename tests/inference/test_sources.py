"""Examples read from files of every format, and from the hub."""

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bayes_lora.inference import sources
from bayes_lora.inference.data import DataConfig, load_task


def test_a_folder_holds_a_task_with_the_hubs_columns(tmp_path, write):
    pair = {"sentence1": "a", "sentence2": "b"}
    write(tmp_path / "stsb" / "train.jsonl", [{**pair, "label": 2.5}, {**pair, "label": 4}])
    write(tmp_path / "stsb" / "validation.jsonl", [{**pair, "label": 0.2}])
    task, train, validation = load_task(DataConfig(task="stsb", data_dir=str(tmp_path)), seed=0)
    assert (task.text_columns, task.num_labels) == (("sentence1", "sentence2"), 1)
    assert train["label"][:] == [2.5, 4.0]
    assert validation.to_list() == [{**pair, "label": 0.2}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_all_formats_say_the_same(tmp_path, suffix, write):
    examples = [{"text": "NA", "label": 3}, {"text": "a , b", "label": 1}]
    files = []
    for name in ("train", "dev"):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "csv":
            path.write_text('text,label\nNA,3\n"a , b",1\n')
        elif suffix == "tsv":
            path.write_text("text\tlabel\nNA\t3\na , b\t1\n")
        elif suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(examples), path)
        else:
            write(path, examples)
        files.append(str(path))
    task, train, _ = load_task(DataConfig(train_file=files[0], validation_file=files[1]), seed=0)
    assert task.label_names == ("1", "3")
    assert train.to_list() == [{"text": "NA", "label": 1}, {"text": "a , b", "label": 0}]


def test_quotes_in_tab_separated_files_are_text(tmp_path):
    (tmp_path / "t.tsv").write_text('text\tlabel\n"a\t0\nb"\t1\n')
    file = str(tmp_path / "t.tsv")
    _, train, _ = load_task(DataConfig(train_file=file, validation_file=file), seed=0)
    assert train["text"][:] == ['"a', 'b"']


def test_the_hub_is_asked_for_the_matched_validation_set_of_mnli(monkeypatch):
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [2]}
    splits = {"train": columns, "validation_matched": {**columns, "label": [1]}}
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return {split: datasets.Dataset.from_dict(c) for split, c in splits.items()}

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    _, train, validation = load_task(DataConfig(task="mnli"), seed=0)
    assert asked == [("nyu-mll/glue", "mnli")]
    assert (train["label"][:], validation["label"][:]) == ([2], [1])


def test_a_folder_without_the_task(tmp_path, write, error_of):
    write(tmp_path / "cola" / "train.jsonl", [{"sentence": "a", "label": 1}])
    message = error_of(DataConfig(task="rte", data_dir=str(tmp_path)))
    assert str(tmp_path / "rte" / "train.jsonl") in message
    message = error_of(DataConfig(task="cola", data_dir=str(tmp_path)))
    assert str(tmp_path / "cola" / "validation.jsonl") in message


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.jsonl", '{"text": "a", "label": 0}\n\n{"text": "b" "label"}\n', "line 3 is not JSON"),
        ("t.json", '[{"text": "a", "label": 0}]', "line 1 is not a JSON object"),
        ("t.jsonl", "", "has no examples"),
        ("t.csv", "text,label\n", "has no examples"),
        ("t.csv", "text,label\na,0,1\n", "Expected 2 columns, got 3"),
        ("t.csv", "text,label\na,0\n,1\n", "row 2: text is missing"),
        ("t.tsv", "text\tlabel\na\t0\nb\t1\nc\t\n", "row 3: label is missing"),
        ("t.csv", "text,text,label\na,b,0\n", "columns twice: text"),
        ("t.parquet", "text", "cannot read"),
        ("t.doc", "text", "must end in .jsonl, .json, .csv, .tsv, .parquet, .txt"),
        ("t.txt", "text\n", "has no column 'label'; it has text"),
        ("t.txt", "\n \n", "has no examples"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, says, error_of):
    path = tmp_path / name
    path.write_text(text)
    message = error_of(DataConfig(train_file=str(path), validation_file=str(path)))
    assert says in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.jsonl", b'{"text": "\xff", "label": 0}'), ("t.csv", b"text,label\ncaf\xe9,0\n")],
)
def test_bytes_that_are_no_text(tmp_path, name, content, error_of):
    (tmp_path / name).write_bytes(content)
    file = str(tmp_path / name)
    assert "utf-8" in error_of(DataConfig(train_file=file, validation_file=file)).lower()


def test_a_hub_out_of_reach_says_how_to_go_on(monkeypatch, tmp_path, error_of):
    # what HF_HUB_OFFLINE=1 sets when the two are imported; and a cache that has nothing
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path)
    message = error_of(DataConfig(task="rte"))
    assert message.startswith("cannot load rte from the hub")
    assert "--data_dir" in message
