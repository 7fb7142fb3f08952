"""Decoders, pairs of stacks, vision transformers, weights in several modules: as the stock models.

What holds for encoders of text is in `test_network` and `test_decided`.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from bayes_lora.costs import adapter_parameters, bit_operations, macs, relative_bops
from bayes_lora.decided import decide_network
from bayes_lora.errors import InputError
from bayes_lora.flat_weights import split_weights
from bayes_lora.network import AdaptedNetwork, Latents
from bayes_lora.targets import linear_layers

KINDS = ["llama", "qwen2", "gpt2", "vit", "albert", "bart", "t5"]


@pytest.fixture
def adapted(backbone, inputs_of, adapter_weights):
    """Make a calibrated network of a kind; returns it, its inputs, and adapter weights."""

    def make(kind, **changes):
        made = AdaptedNetwork(backbone(kind), rank=3, alpha=6.0, **changes).eval()
        inputs, weights = inputs_of(kind), adapter_weights(made)
        made.calibrate([inputs], weights)
        return made, inputs, weights

    return make


def bare_logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_initial_adapters_and_closed_gates_are_the_pretrained_function(kind, adapted, backbone):
    network, inputs, weights = adapted(kind)
    wanted = bare_logits(backbone(kind), inputs)
    closed = torch.zeros(network.rank_gate_shape)
    with torch.no_grad():
        for latents in (Latents(network.initial_adapter_weights()), Latents(weights, closed)):
            assert torch.equal(network(inputs, latents), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_are_peft_with_the_same_weights(kind, adapted, backbone):
    network, inputs, weights = adapted(kind)
    paths = [spec.path for spec in network.specs]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=paths, fan_in_fan_out=kind == "gpt2")
    peft = get_peft_model(backbone(kind), config).eval()
    state = dict(peft.named_parameters())
    for path, (A, e, B) in zip(paths, split_weights(weights, network.specs, 3), strict=True):
        name = f"base_model.model.{path}.lora_{{}}.default.weight"
        state[name.format("A")].data.copy_(A)
        state[name.format("B")].data.copy_(B * e)
    with torch.no_grad():
        wanted = peft(**inputs).logits
        found = network(inputs, Latents(weights, torch.ones(network.rank_gate_shape)))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (wanted - bare_logits(backbone(kind), inputs)).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_gate(kind, adapted):
    network, inputs, weights = adapted(kind)
    rank = torch.full(network.rank_gate_shape, 0.6, requires_grad=True)
    bits = torch.full(network.bit_gate_shape, 0.7, requires_grad=True)
    network(inputs, Latents(weights, rank, bits)).square().sum().backward()
    assert (rank.grad != 0).all()
    assert (bits.grad != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_decided_network_is_the_gated_one_at_the_decision(kind, adapted):
    network, inputs, weights = adapted(kind)
    draw = torch.Generator().manual_seed(5)
    rank = (torch.rand(network.rank_gate_shape, generator=draw) < 0.6).float()
    bits = (torch.rand(network.bit_gate_shape, generator=draw) < 0.7).float()
    with torch.no_grad():
        wanted = network(inputs, Latents(weights, rank, bits))
        found = decide_network(network, weights, rank, bits)(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_layers_are_stock_layers(kind, adapted, backbone):
    network, inputs, weights = adapted(kind, quantized_tensors=("weight", "A", "B"))
    bits = torch.tensor([1.0, 1.0, 0.0]).expand(network.bit_gate_shape)
    with torch.no_grad():
        wanted = network(inputs, Latents(weights, None, bits))
    paths = [spec.path for spec in network.specs]
    decided = decide_network(network, weights, None, bits)
    for path in paths:
        decided.set_submodule(path, decided.get_submodule(path).merged())
    stock = backbone(kind)
    stock.load_state_dict(decided.state_dict())
    torch.testing.assert_close(bare_logits(stock, inputs), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_decoder_counts_neither_in_logits_nor_in_ranges(
    kind, side, adapted, batch, adapter_weights
):
    """A sentence alone, and among longer ones."""
    network, _, weights = adapted(kind)
    length = int(batch["attention_mask"][4].sum())
    alone = {name: values[4:, :length] for name, values in batch.items()}
    gap = torch.zeros(1, 7 - length, dtype=torch.long)
    parts = {name: [v, gap] if side == "right" else [gap, v] for name, v in alone.items()}
    padded = {name: torch.cat(values, 1) for name, values in parts.items()}
    if kind == "gpt2" and side == "left":  # whose positions are learned, not relative
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    limits = {}
    for name, inputs in (("alone", alone), ("padded", padded)):
        network.calibrate([inputs], weights)
        limits[name] = torch.stack([layer.input_limits for layer in network._layers])
    torch.testing.assert_close(limits["padded"], limits["alone"], atol=0, rtol=1e-4)
    with torch.no_grad():
        found, wanted = (network(inputs, Latents(weights)) for inputs in (padded, alone))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_images_are_calibrated_on_all_their_patches(adapted, images):
    network, _, weights = adapted("vit")
    seen = []
    handle = network._layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.calibrate([images], weights, tokens_per_batch=1000)
    handle.remove()
    assert seen[0].shape == (5, 5, 16)  # four patches and what is classified
    largest = seen[0].abs().max()
    assert float(network._layers[0].input_limits[3]) == pytest.approx(2 * float(largest))


def test_costs_of_a_block_of_llama_by_hand(backbone):
    """Two heads share a key and a value: 16 wide queries, 8 wide keys and values."""
    network = AdaptedNetwork(backbone("llama"), rank=3)
    assert [(s.in_features, s.out_features) for s in network.specs[:7]] == [
        (16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16),
    ]  # fmt: skip
    frozen = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    adapters = 2 * 3 * (2 * (16 + 1 + 16) + 2 * (16 + 1 + 8) + 3 * (16 + 1 + 24))
    assert int(adapter_parameters(network).sum()) == network.num_adapter_weights == adapters
    assert int(macs(network).sum()) == frozen + adapters
    bits = torch.zeros(network.bit_gate_shape)
    bits[:, 0, :2] = 1  # a weight of 8 bits, all others 2
    key = 16 * 8 * 8 * 2 + 3 * (16 * 2 * 2 + (1 + 8) * 2 * 2)
    assert float(bit_operations(network, None, bits)[1]) == key


def test_costs_of_gpt2_by_hand(backbone):
    assert all(isinstance(layer, Conv1D) for layer in linear_layers(backbone("gpt2")).values())
    network = AdaptedNetwork(backbone("gpt2"), rank=3, target_modules=r".*c_attn")
    assert [(s.in_features, s.out_features) for s in network.specs] == [(16, 48)] * 2
    assert network.frozen_macs == 2 * (16 * 16 + 2 * 16 * 24)
    assert int(macs(network).sum()) == 2 * (16 * 48 + 3 * (16 + 1 + 48))


def test_a_layer_that_is_applied_at_several_depths_costs_each_time(backbone, batch):
    """ALBERT, whose two groups of layers are gone through three times and twice."""
    model = backbone("albert", num_hidden_layers=5, num_hidden_groups=2)
    calls = dict.fromkeys(linear_layers(model), 0)

    def count(path):
        calls[path] += 1

    for path, layer in linear_layers(model).items():
        layer.register_forward_hook(lambda *_, path=path: count(path))
    bare_logits(model, batch)
    some = AdaptedNetwork(copy.deepcopy(model), rank=3, target_modules=".*(query|key|ffn)")
    assert {spec.path: spec.uses for spec in some.specs} == {
        spec.path: calls[spec.path] for spec in some.specs
    }
    assert sorted(set(calls.values())) == [2, 3]
    assert some.num_adapter_weights == 2 * 3 * (2 * (16 + 1 + 16) + 16 + 1 + 24)  # once
    adapted_macs = 5 * (2 * 16 * 16 + 16 * 24) + 5 * some.num_adapter_weights // 2
    assert int(macs(some).sum()) == adapted_macs
    assert some.frozen_macs == 5 * (2 * 16 * 16 + 16 * 24)
    share = (adapted_macs / 4 + some.frozen_macs) / (adapted_macs + some.frozen_macs)
    sixteen = torch.ones(some.bit_gate_shape)
    assert float(relative_bops(some, None, sixteen)) == pytest.approx(share)


def tied(model, how):
    """Let two modules of a tiny BERT share a weight; returns their names."""
    first, second = model.bert.encoder.layer
    one, other = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1"
    if how == "weight":
        second.attention.self.key.weight = first.attention.self.query.weight
        return one, f"{other}.attention.self.key"
    if how == "module":
        second.attention.self.key = first.attention.self.query
        return one, f"{other}.attention.self.key"
    if how == "block":
        model.bert.encoder.layer[1] = first
        return one, f"{other}.attention.self.query"
    embedding = model.bert.embeddings.word_embeddings = nn.Embedding(16, 16)
    embedding.weight = first.attention.self.query.weight
    return "bert.embeddings.word_embeddings", one


@pytest.mark.parametrize("how", ["weight", "module", "block", "embedding"])
def test_a_weight_that_is_shared_is_refused_with_the_names_of_its_modules(how, backbone):
    model = backbone()
    one, other = tied(model, how)
    for target_modules in ("all-linear", ".*layer.*(query|key)"):
        with pytest.raises(InputError, match=f"^{one} and {other} share one weight") as caught:
            AdaptedNetwork(model, target_modules=target_modules)
        assert "\n" not in str(caught.value)
    assert not any(name.endswith(".base") for name, _ in model.named_modules())  # left as it was


def test_layers_beside_a_shared_weight_are_adapted(backbone):
    model = backbone()
    tied(model, "module")
    network = AdaptedNetwork(model, target_modules=".*value")
    assert len(network.specs) == 2
    assert network.frozen_macs == 2 * (3 * 16 * 16 + 2 * 16 * 24)  # as often as it is applied


def test_a_head_that_is_tied_to_the_embeddings_is_no_target(batch):
    """The language model of GPT-2: what is adapted shares nothing."""
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=40,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    wanted = bare_logits(copy.deepcopy(model), batch)
    network = AdaptedNetwork(model, rank=3).eval()
    with torch.no_grad():
        assert torch.equal(network(batch, Latents(network.initial_adapter_weights())), wanted)
    assert len(network.specs) == 8
    with pytest.raises(InputError, match="matches no linear layer"):
        AdaptedNetwork(GPT2LMHeadModel(config), target_modules="lm_head")
