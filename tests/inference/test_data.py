"""From a configuration to tokenized sets: small files in, one-line errors for bad ones."""

import json

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, HfArgumentParser, PreTrainedTokenizerFast

from bayes_lora.errors import InputError
from bayes_lora.inference import sources
from bayes_lora.inference.agreement import generate
from bayes_lora.inference.data import DataConfig, load_task, tokenize
from bayes_lora.inference.tasks import TASKS

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]


@pytest.fixture
def tokenizer():
    """Single letters; [CLS] a [SEP] for one text, [CLS] a [SEP] b [SEP] for two."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    )


def rows(*labels, text="a b"):
    return [{"text": text, "label": label} for label in labels]


def write(path, examples):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


@pytest.fixture
def custom(tmp_path):
    """Write both files, return the configuration that reads them."""

    def config(train, validation=None, **options):
        files = {
            "train_file": write(tmp_path / "train.jsonl", train),
            "validation_file": write(tmp_path / "dev.jsonl", validation or train),
        }
        return DataConfig(**files, **options)

    return config


def error_of(config):
    with pytest.raises(InputError) as caught:
        load_task(config, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------- what works


def test_every_option_is_on_the_command_line():
    parser = HfArgumentParser(DataConfig)
    arguments = "--train_file t --validation_file v --text_columns a b --problem regression"
    (config,) = parser.parse_args_into_dataclasses([*arguments.split(), "--max_length", "9"])
    assert config == DataConfig(
        train_file="t",
        validation_file="v",
        text_columns=["a", "b"],
        problem="regression",
        max_length=9,
    )


def test_the_embedded_task_is_the_same_whatever_the_seed():
    task, train, validation = load_task(DataConfig(), seed=1)
    assert task is TASKS["agreement"]
    assert train.to_list() == generate(3000, seed=0, split="train")
    assert validation.to_list() == generate(1000, seed=0, split="validation")
    assert train.to_list() == load_task(DataConfig(), seed=2)[1].to_list()


def test_a_subset_is_random_and_drawn_by_the_seed(custom):
    examples = [{"text": str(i), "label": i % 2} for i in range(200)]
    config = custom(examples, max_train_examples=50)
    first, again, other = (load_task(config, seed)[1]["text"][:] for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 50
    # drawn from all of them: the mean index of 50 of 200 has standard error 50
    assert max(map(int, first)) >= 100
    _, train, validation = load_task(custom(examples, max_train_examples=500), seed=0)
    assert sorted(map(int, train["text"])) == list(range(200))
    assert validation["text"][:] == [str(i) for i in range(200)]


def test_a_folder_holds_a_task_with_the_hubs_columns(tmp_path):
    pair = {"sentence1": "a", "sentence2": "b"}
    write(tmp_path / "stsb" / "train.jsonl", [{**pair, "label": 2.5}, {**pair, "label": 4}])
    write(tmp_path / "stsb" / "validation.jsonl", [{**pair, "label": 0.2}])
    task, train, validation = load_task(DataConfig(task="stsb", data_dir=str(tmp_path)), seed=0)
    assert (task.text_columns, task.num_labels) == (("sentence1", "sentence2"), 1)
    assert train["label"][:] == [2.5, 4.0]
    assert validation.to_list() == [{**pair, "label": 0.2}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_all_formats_say_the_same(tmp_path, suffix):
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


def test_classes_have_ids_by_the_sorted_training_labels(custom):
    config = custom(rows("spam", "ham", "spam", "eggs"), rows("spam", "eggs"))
    task, train, validation = load_task(config, seed=0)
    assert (task.name, task.label_names) == ("custom", ("eggs", "ham", "spam"))
    assert train["label"][:] == [2, 1, 2, 0]
    assert validation["label"][:] == [2, 0]


def test_integers_sort_as_numbers(custom):
    task, train, _ = load_task(custom(rows(10, 9, -1)), seed=0)
    assert task.label_names == ("-1", "9", "10")
    assert train["label"][:] == [2, 1, 0]


def test_a_subset_does_not_change_the_classes(custom):
    task, *_ = load_task(custom(rows("x", "y", "z"), max_train_examples=1), seed=0)
    assert task.label_names == ("x", "y", "z")


def test_decimal_points_mean_regression_unless_told(custom):
    task, train, _ = load_task(custom(rows(1, 2.5)), seed=0)
    assert (task.is_regression, train["label"][:]) == (True, [1.0, 2.5])
    task, *_ = load_task(custom(rows(1.5, 2.5), problem="classification"), seed=0)
    assert task.label_names == ("1.5", "2.5")
    task, train, _ = load_task(custom(rows(1, 2), problem="regression"), seed=0)
    assert (task.is_regression, train["label"][:]) == (True, [1.0, 2.0])


def test_named_columns_of_a_custom_pair(custom):
    example = {"id": "7", "q": "a", "r": "b", "gold": "no"}
    config = custom(
        [example, {**example, "gold": "yes"}], text_columns=["r", "q"], label_column="gold"
    )
    task, train, _ = load_task(config, seed=0)
    assert task.text_columns == ("r", "q")
    assert train["gold"][:] == [0, 1]


def test_tokens_of_one_text(custom, tokenizer):
    task, train, _ = load_task(custom(rows("x", "y", text="a b")), seed=0)
    tokens = tokenize(train, task, tokenizer, max_length=8)
    assert tokens.column_names == ["input_ids", "attention_mask", "labels"]
    assert tokens[1] == {"input_ids": [1, 4, 5, 2], "attention_mask": [1] * 4, "labels": 1}
    assert str(tokens.features["labels"].dtype) == "int64"


def test_tokens_of_a_pair_keep_order_and_are_cut(custom, tokenizer):
    examples = [{"z": "a " * 9, "q": "b", "label": y} for y in (0.5, 2.25)]
    config = custom(examples, text_columns=["z", "q"])
    task, train, _ = load_task(config, seed=0)
    tokens = tokenize(train, task, tokenizer, max_length=8)
    assert tokens[0]["input_ids"] == [1, 4, 4, 4, 4, 2, 5, 2]
    assert str(tokens.features["labels"].dtype) == "float32"
    assert tokens["labels"][:] == [0.5, 2.25]


def test_the_label_column_may_be_called_labels(custom, tokenizer):
    examples = [{"text": "a", "labels": y} for y in ("n", "y")]
    task, train, _ = load_task(custom(examples, label_column="labels"), seed=0)
    assert tokenize(train, task, tokenizer, 8)["labels"][:] == [0, 1]


def test_tokens_are_what_the_collator_takes(custom, tokenizer):
    examples = [{"text": "a", "label": 0.5}, {"text": "a b c", "label": 2.5}]
    task, train, _ = load_task(custom(examples), seed=0)
    batch = DataCollatorWithPadding(tokenizer)(list(tokenize(train, task, tokenizer, 8)))
    assert batch["input_ids"].tolist() == [[1, 4, 2, 0, 0], [1, 4, 5, 6, 2]]
    assert batch["labels"].tolist() == [0.5, 2.5]
    assert batch["labels"].is_floating_point()


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


# ------------------------------------------------------------------- what a user can get wrong


def test_unknown_task():
    message = error_of(DataConfig(task="colas"))
    assert "'colas'" in message
    assert all(name in message for name in TASKS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_train_examples": 0}, "max_train_examples is 0"),
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
def test_options_that_do_not_go_together(options, says):
    assert says in error_of(DataConfig(**options))


def test_a_folder_without_the_task(tmp_path):
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
        ("t.parquet", "text", "cannot read"),
        ("t.txt", "text", "must end in .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text)
    message = error_of(DataConfig(train_file=str(path), validation_file=str(path)))
    assert says in message
    assert str(path) in message


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "\xff", "label": 0}')
    file = str(tmp_path / "t.jsonl")
    assert "utf-8" in error_of(DataConfig(train_file=file, validation_file=file))


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
        (rows(0, 1), [*rows(0), {"label": 1, "text": None}], {}, "dev.jsonl, row 2: text is None"),
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
        # others
        (
            [{"text": "a", "label": 0, "z": 1}, {"text": "a", "label": 1, "z": []}],
            None,
            {},
            "mixes",
        ),
    ],
)
def test_examples_that_will_not_do(custom, train, validation, options, says):
    assert says in error_of(custom(train, validation, **options))


def test_labels_of_a_known_task_are_its_ids(tmp_path):
    write(tmp_path / "cola" / "train.jsonl", [{"sentence": "a", "label": y} for y in (0, 1, 2)])
    write(tmp_path / "cola" / "validation.jsonl", [{"sentence": "a", "label": -1}])
    config = DataConfig(task="cola", data_dir=str(tmp_path))
    assert "train.jsonl, row 3: label is 2; the classes are 0, 1" in error_of(config)
    write(tmp_path / "cola" / "train.jsonl", [{"sentence": "a", "label": 1}])
    assert "validation.jsonl, row 1: label is -1" in error_of(config)


def test_more_tokens_than_the_backbone_reads(custom, tokenizer):
    task, train, _ = load_task(custom(rows(0, 1)), seed=0)
    with pytest.raises(InputError, match="max_length is 17; this backbone reads 16 at most"):
        tokenize(train, task, tokenizer, max_length=17)


def test_a_hub_out_of_reach_says_how_to_go_on(monkeypatch, tmp_path):
    # what HF_HUB_OFFLINE=1 sets when the two are imported; and a cache that has nothing
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path)
    message = error_of(DataConfig(task="rte"))
    assert message.startswith("cannot load rte from the hub")
    assert "--data_dir" in message
