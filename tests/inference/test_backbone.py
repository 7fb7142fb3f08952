"""Checkpoints that do not fit the classifier exactly."""

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.network import AdaptedNetwork


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
