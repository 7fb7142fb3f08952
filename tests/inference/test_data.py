"""From a configuration to two sets of examples, and to their tokens."""

import pytest
from transformers import DataCollatorWithPadding, HfArgumentParser

from bayes_lora.errors import InputError
from bayes_lora.inference.agreement import generate
from bayes_lora.inference.data import DataConfig, load_task
from bayes_lora.inference.encoding import encode_dataset
from bayes_lora.inference.tasks import TASKS


def rows(*labels, text="a b"):
    return [{"text": text, "label": label} for label in labels]


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
    for found, size, split in ((train, 3000, "train"), (validation, 1000, "validation")):
        rows = generate(size, seed=0, split=split)
        assert found.to_list() == [{k: row[k] for k in ("sentence", "label")} for row in rows]
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


def test_a_part_of_the_training_set_is_held_out(custom):
    examples = [{"text": str(i), "label": i % 2} for i in range(200)]
    config = custom(examples, [{"text": "v", "label": 0}], max_train_examples=50, holdout_share=0.2)
    _, train, held = load_task(config, seed=0)
    texts, held_texts = set(train["text"]), set(held["text"])
    assert (len(texts), len(held_texts)) == (40, 10)
    assert not texts & held_texts
    config.holdout_share = None
    assert texts | held_texts == set(load_task(config, seed=0)[1]["text"])


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
    tokens = encode_dataset(train, task, tokenizer, max_length=8)
    assert tokens.column_names == ["input_ids", "attention_mask", "labels"]
    assert tokens[1] == {"input_ids": [1, 4, 5, 2], "attention_mask": [1] * 4, "labels": 1}
    assert str(tokens.features["labels"].dtype) == "int64"


def test_tokens_of_a_pair_keep_order_and_are_cut(custom, tokenizer):
    examples = [{"z": "a " * 9, "q": "b", "label": y} for y in (0.5, 2.25)]
    config = custom(examples, text_columns=["z", "q"])
    task, train, _ = load_task(config, seed=0)
    tokens = encode_dataset(train, task, tokenizer, max_length=8)
    assert tokens[0]["input_ids"] == [1, 4, 4, 4, 4, 2, 5, 2]
    assert str(tokens.features["labels"].dtype) == "float32"
    assert tokens["labels"][:] == [0.5, 2.25]


def test_the_label_column_may_be_called_labels(custom, tokenizer):
    examples = [{"text": "a", "labels": y} for y in ("n", "y")]
    task, train, _ = load_task(custom(examples, label_column="labels"), seed=0)
    assert encode_dataset(train, task, tokenizer, 8)["labels"][:] == [0, 1]


def test_tokens_are_what_the_collator_takes(custom, tokenizer):
    examples = [{"text": "a", "label": 0.5}, {"text": "a b c", "label": 2.5}]
    task, train, _ = load_task(custom(examples), seed=0)
    batch = DataCollatorWithPadding(tokenizer)(list(encode_dataset(train, task, tokenizer, 8)))
    assert batch["input_ids"].tolist() == [[1, 4, 2, 0, 0], [1, 4, 5, 6, 2]]
    assert batch["labels"].tolist() == [0.5, 2.5]
    assert batch["labels"].is_floating_point()


def test_more_tokens_than_the_backbone_reads(custom, tokenizer):
    task, train, _ = load_task(custom(rows(0, 1)), seed=0)
    with pytest.raises(InputError, match="max_length is 17; this backbone reads 16 at most"):
        encode_dataset(train, task, tokenizer, max_length=17)


def test_a_column_that_is_not_used_may_hold_anything(custom):
    _, train, _ = load_task(
        custom([{"text": "a", "label": 0, "z": 1}, {"text": "a", "label": 1, "z": []}]), seed=0
    )
    assert train.column_names == ["text", "label"]


def test_a_tokenizer_that_knows_no_word_is_refused(custom, tokenizer):
    task, train, _ = load_task(custom(rows("x", "y", text="word less")), seed=0)
    with pytest.raises(InputError, match=r"knows 0 of 4 tokens of custom"):
        encode_dataset(train, task, tokenizer, max_length=8)
