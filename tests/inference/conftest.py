"""Small files of examples, a tokenizer that needs no model, and the command on a tiny backbone."""

import csv
import json

import pytest
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bayes_lora.errors import InputError
from bayes_lora.inference.agreement import generate
from bayes_lora.inference.cli import main
from bayes_lora.inference.data import DataConfig, load_task

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


@pytest.fixture
def write():
    """Write examples as JSON lines, return the path."""

    def write(path, examples):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        return str(path)

    return write


@pytest.fixture
def custom(tmp_path, write):
    """Write both files, return the configuration that reads them."""

    def config(train, validation=None, **options):
        files = {
            "train_file": write(tmp_path / "train.jsonl", train),
            "validation_file": write(tmp_path / "dev.jsonl", validation or train),
        }
        return DataConfig(**files, **options)

    return config


@pytest.fixture
def error_of():
    """Load a configuration that is wrong, return the one line that says what."""

    def error_of(config):
        with pytest.raises(InputError) as caught:
            load_task(config, seed=0)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return error_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved model and two small files of examples."""
    path = tmp_path_factory.mktemp("inputs")
    rows = {
        split: generate(size, seed=0, split=split)
        for split, size in (("train", 120), ("validation", 60))
    }
    words = {w for part in rows.values() for row in part for w in row["sentence"].split()}
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    ).save_pretrained(path / "model")
    for split, part in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (path / f"{split}.jsonl").write_text(text)
        scores = [row | {"label": len(row["sentence"]) / 20} for row in part]
        text = "".join(json.dumps(row) + "\n" for row in scores)
        (path / f"{split}_scores.jsonl").write_text(text)
    return path, len(vocabulary)


@pytest.fixture
def inputs(folder, backbone):
    path, size = folder
    if not (path / "model" / "config.json").exists():
        made = backbone(vocab_size=size, hidden_dropout_prob=0.1)
        made.save_pretrained(path / "model")
    return path


@pytest.fixture
def command(inputs, tmp_path, capsys):
    """Run `bayes-lora finetune` with changes to a small run; returns exit code and outputs."""

    def run(**changes):
        AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would
        options = {
            "train_file": inputs / "train.jsonl",
            "validation_file": inputs / "validation.jsonl",
            "text_columns": "sentence",
            "backbone": inputs / "model",
            "rank": 3,
            "epochs": 4,
            "batch_size": 20,
            "max_length": 40,
            "output_dir": tmp_path / "run",
        } | changes
        arguments = ["finetune"]
        for name, value in options.items():
            if value is not None:
                arguments += [f"--{name}", *str(value).split()]
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def read_history():
    """Read the history that a run left, one dict a step."""

    def read_history(path):
        with (path / "history.csv").open() as file:
            return list(csv.DictReader(file))

    return read_history
