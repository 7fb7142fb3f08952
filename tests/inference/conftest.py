"""Small files of examples, and a tokenizer that needs no model."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bayes_lora.errors import InputError
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
