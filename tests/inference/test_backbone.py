"""Checkpoints that do not fit the classifier exactly."""

import pytest
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import (
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.network import AdaptedNetwork, Latents


@pytest.fixture
def folder(tmp_path, tokenizer, backbone):
    tokenizer.save_pretrained(tmp_path)
    backbone(num_labels=3).save_pretrained(tmp_path)
    return tmp_path


def trained(loaded):
    network = AdaptedNetwork(loaded.model, trained_parameters=loaded.new_parameters)
    return {name for name, p in network.backbone.named_parameters() if p.requires_grad}


HEAD = {"classifier.weight", "classifier.bias"}


def test_the_head_of_another_task_is_drawn_anew(folder):
    kept, new = load_backbone(str(folder), 3), load_backbone(str(folder), 2)
    assert set(kept.new_parameters) == set()
    assert set(new.new_parameters) == HEAD
    assert new.model.classifier.weight.shape == (2, 16)
    assert trained(kept) == trained(new) == HEAD


def test_a_pooler_that_the_checkpoint_lacks_is_trained(folder, backbone):
    BertForMaskedLM(backbone().config).save_pretrained(folder)
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trained(load_backbone(str(folder), 2)) == HEAD | pooler


def test_an_encoder_without_weights_is_refused(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    lost = [name for name in weights if ".layer.1." in name]
    save_file({k: v for k, v in weights.items() if k not in lost}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks .*layer\.1\.attention.*, 6 layers in all"):
        load_backbone(str(folder), 2)


def test_a_tokenizer_of_another_model_is_refused(folder, backbone):
    backbone(vocab_size=5).save_pretrained(folder)
    with pytest.raises(InputError, match="has 12 tokens, its model 5"):
        load_backbone(str(folder), 2)


def test_weights_that_are_no_weights_are_one_line(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"cannot load backbone .*is the folder complete\?"):
        load_backbone(str(folder), 2)


def test_a_decoder_without_padding_pads_with_its_end(folder, tokenizer):
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=10, pad_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    loaded = load_backbone(str(folder), 2)
    assert loaded.processor.pad_token == "[SEP]"
    assert loaded.model.config.pad_token_id == 2
    assert loaded.processor.model_max_length == 10  # fewer than the tokenizer's own 16


def test_a_network_that_looks_at_its_weights_type_is_adapted(batch):
    config = T5Config(
        vocab_size=60, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, num_labels=2,
    )  # fmt: skip
    network = AdaptedNetwork(T5ForSequenceClassification(config), rank=2)
    ids = batch["input_ids"].clone()
    ids[:, -1] = 1  # it classifies at the end of a sentence
    weights = network.initial_adapter_weights()
    assert network({"input_ids": ids}, Latents(weights)).shape == (5, 2)


def test_a_folder_with_only_a_sentencepiece_model_has_its_tokenizer(tmp_path, backbone):
    """As the hub keeps DeBERTaV3: `spm.model`, no `tokenizer.json`."""
    with (tmp_path / "spm.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["the nurse near the doctors is kind"] * 20),
            model_writer=file,
            vocab_size=22,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
            user_defined_symbols=["[MASK]"],
            minloglevel=2,
        )  # fmt: skip
    backbone("deberta").save_pretrained(tmp_path)
    tokenizer = load_backbone(str(tmp_path), 2).processor
    assert "[UNK]" not in tokenizer.tokenize("the doctors near the nurse")
    assert tokenizer("the nurse")["input_ids"][0] == 1


def test_an_empty_name_is_not_the_default():
    with pytest.raises(InputError, match="backbone '' is no model folder"):
        load_backbone("", 2)
