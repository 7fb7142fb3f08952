"""A backbone with batch normalisation: what came with the frozen weights stays, and is exported."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import CvtConfig, CvtForImageClassification

from bayes_lora.decided import decide_network
from bayes_lora.inference.packed import layout, read_packed, write_packed
from bayes_lora.inference.peft_adapter import decided_layers
from bayes_lora.network import AdaptedNetwork, Latents

SIZES = {"embed_dim": [8, 8, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "num_labels": 2}


@pytest.fixture
def pretrained():
    """Make the same network again and again; its statistics are not those of a new one."""

    def make():
        torch.manual_seed(0)
        model = CvtForImageClassification(CvtConfig(**SIZES))
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        return model

    return make


@pytest.fixture
def batch():
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def test_training_leaves_the_statistics(pretrained, batch):
    network = AdaptedNetwork(pretrained(), rank=2)
    network.train()
    network(batch, Latents(network.initial_adapter_weights()))
    after, before = network.backbone.state_dict(), pretrained().state_dict()
    names = [name for name in before if "running" in name or name.endswith("tracked")]
    assert len(names) > 5
    assert all(after[name].equal(before[name]) for name in names)
    assert any(isinstance(m, torch.nn.Dropout) and m.training for m in network.modules())


def test_what_is_packed_with_the_base_has_them(pretrained, batch, tmp_path):
    network = AdaptedNetwork(pretrained(), rank=2).eval()
    weights = 0.3 * torch.randn(network.num_adapter_weights)
    model = decide_network(network, weights, torch.ones(network.rank_gate_shape), None).eval()
    layers = decided_layers(model)
    write_packed(tmp_path / "packed.safetensors", model, layers, with_base=True)
    state = load_file(tmp_path / "packed.safetensors")
    fresh = CvtForImageClassification(CvtConfig(**SIZES))
    again = read_packed(state, fresh, layout(layers), with_base=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    del state["module." + next(name for name in model.state_dict() if "running_mean" in name)]
    with pytest.raises(KeyError, match="running_mean"):
        read_packed(state, CvtForImageClassification(CvtConfig(**SIZES)), layout(layers), True)
