"""The adapted network against PEFT, against the bare network, and against wrong shapes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bayes_lora.errors import InputError
from bayes_lora.flat_weights import split_weights
from bayes_lora.gates import independent
from bayes_lora.network import AdaptedNetwork, Latents


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta"])
def test_open_and_unquantized_equals_peft_with_the_same_weights(
    kind, backbone, batch, adapter_weights
):
    bare = backbone(kind).eval()
    network = AdaptedNetwork(copy.deepcopy(bare), rank=3, alpha=6.0).eval()
    weights = adapter_weights(network)
    paths = [spec.path for spec in network.specs]
    peft = get_peft_model(bare, LoraConfig(r=3, lora_alpha=6, target_modules=paths)).eval()
    state = dict(peft.named_parameters())
    factors = split_weights(weights, network.specs, network.rank)
    for path, (A, e, B) in zip(paths, factors, strict=True):
        name = f"base_model.model.{path}.lora_{{}}.default.weight"
        state[name.format("A")].data.copy_(A)
        state[name.format("B")].data.copy_(B * e)  # PEFT has no e: fold it into B
    open_gates = torch.ones(network.rank_gate_shape)
    with torch.no_grad():
        reference = peft(**batch).logits
        for latents in (Latents(weights), Latents(weights, open_gates)):
            torch.testing.assert_close(network(batch, latents), reference, atol=1e-5, rtol=0)
        assert (reference - bare_logits(backbone(kind), batch)).abs().max() > 0.1


def bare_logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta"])
def test_rank_zero_everywhere_equals_the_bare_network_exactly(
    kind, backbone, batch, adapter_weights
):
    network = AdaptedNetwork(backbone(kind), rank=3).eval()
    closed = torch.zeros(network.rank_gate_shape)
    with torch.no_grad():
        found = network(batch, Latents(adapter_weights(network), closed))
    assert torch.equal(found, bare_logits(backbone(kind), batch))


def test_initial_adapters_change_nothing(backbone, batch):
    network = AdaptedNetwork(backbone(), rank=4).eval()
    with torch.no_grad():
        found = network(batch, Latents(network.initial_adapter_weights()))
    assert torch.equal(found, bare_logits(backbone(), batch))


def test_a_closed_nested_gate_closes_all_later_components(network, batch, adapter_weights):
    weights = adapter_weights(network)
    first_only = torch.tensor([1.0, 0.0, 1.0]).expand(network.rank_gate_shape)
    reference = torch.tensor([1.0, 0.0, 0.0]).expand(network.rank_gate_shape)
    with torch.no_grad():
        found = network(batch, Latents(weights, first_only))
        torch.testing.assert_close(found, network(batch, Latents(weights, reference)))
        network.structure = independent
        assert not torch.allclose(found, network(batch, Latents(weights, first_only)), atol=1e-4)


def test_quantized_layer_equals_the_formula(network, batch, adapter_weights):
    """Recompute one layer from the maths of its docstring, with plain rounding."""
    latents = Latents(
        adapter_weights(network),
        torch.ones(network.rank_gate_shape),
        torch.tensor([1.0, 1.0, 0.0]).expand(network.bit_gate_shape),  # 8 bits everywhere
    )
    layer, lent = network._layers[0], network.unpack(latents)[0]
    x = torch.randn(4, 16)
    layer.latents = lent
    found = layer(x)
    layer.latents = None

    def q(value, limit):
        step = 2 * limit / 255
        return (value / step).round().clamp(-127, 127) * step

    def own(value, dim):
        covering = value.abs().amax(dim, keepdim=True) * 255 / 254
        rms = value.square().mean(dim, keepdim=True).sqrt()
        return q(value, torch.minimum(covering, 3.93 * rms))

    A, e, B = lent.lora_A, lent.lora_e, lent.lora_B
    x = q(x, layer.input_limits[2])
    hidden = q(x @ own(A, 1).T, layer.hidden_limits[2])
    expected = (
        x @ q(layer.base.weight, layer.weight_limits[2]).T
        + 2.0 * (hidden * own(e, 0)) @ own(B, 0).T  # alpha / R = 6 / 3
        + layer.base.bias
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("bits", "most"), [(16, 1e-3), (8, 0.2)])
def test_more_bits_come_nearer_to_the_unquantized_network(
    network, batch, adapter_weights, bits, most
):
    weights = adapter_weights(network)
    gates = torch.tensor([1.0, 1.0, float(bits == 16)]).expand(network.bit_gate_shape)
    with torch.no_grad():
        exact = network(batch, Latents(weights))
        error = (network(batch, Latents(weights, None, gates)) - exact).abs().max()
    assert 0 < error < most * exact.abs().max()


def test_nothing_of_a_draw_is_kept(network, batch, adapter_weights):
    with torch.no_grad():
        before = network.backbone(**batch).logits
        network(batch, Latents(adapter_weights(network)))
        assert torch.equal(network.backbone(**batch).logits, before)
        with pytest.raises(ValueError, match="input_ids"):
            network({"attention_mask": batch["attention_mask"]}, Latents(adapter_weights(network)))
        assert torch.equal(network.backbone(**batch).logits, before)


@pytest.mark.parametrize("site", ["adapter_weights", "rank_gate", "bit_gate"])
def test_a_latent_of_a_wrong_shape_is_refused(network, batch, adapter_weights, site):
    latents = {
        "adapter_weights": adapter_weights(network),
        "rank_gate": torch.ones(network.rank_gate_shape),
        "bit_gate": torch.ones(network.bit_gate_shape),
    }
    latents[site] = latents[site][:1]  # would broadcast
    with pytest.raises(ValueError, match=f"{site} has shape"):
        network(batch, Latents(**latents))


def test_only_the_head_is_trainable(network):
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trainable == {
        "backbone.classifier.weight",
        "backbone.classifier.bias",
    }


def test_targets_are_the_blocks_or_what_the_expression_says(backbone):
    all_linear = AdaptedNetwork(backbone("deberta"))
    assert len(all_linear.specs) == 12
    assert all_linear.frozen_macs == 0
    some = AdaptedNetwork(backbone("deberta"), target_modules=r".*\.(query|value)_proj")
    assert [spec.kind for spec in some.specs[:2]] == [
        "attention.self.query_proj",
        "attention.self.value_proj",
    ]
    assert some.frozen_macs == 2 * (2 * 16 * 16 + 2 * 16 * 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ".*nothing"}, r"matches no linear layer; there are .*query"),
        ({"target_modules": "*"}, "no regular expression"),
        ({"target_modules": "classifier"}, "matches no linear layer"),
        ({"rank": 0}, "at least 1"),
        ({"quantized_tensors": ["weight", "bias"]}, "no such tensor"),
    ],
)
def test_bad_arguments_say_what_there_is(backbone, arguments, message):
    with pytest.raises(InputError, match=message):
        AdaptedNetwork(backbone(), **arguments)


def test_calibration_leaves_padding_out(backbone, batch, adapter_weights):
    network = AdaptedNetwork(backbone(), rank=3).eval()
    network.calibrate([batch], adapter_weights(network))
    limits = network._layers[0].input_limits.clone()
    network.backbone.bert.embeddings.word_embeddings.weight.data[0] = 1e3  # the padding token
    network.calibrate([batch], adapter_weights(network))
    assert torch.equal(network._layers[0].input_limits, limits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_backbone_that_is_not_in_single_precision_is_refused(backbone, dtype):
    with pytest.raises(ValueError, match="must be in float32"):
        AdaptedNetwork(backbone().to(dtype))


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta"])
def test_activations_computed_twice_give_the_same_gradients(kind, backbone, batch, adapter_weights):
    """With gates open in part, whose gradient a block computed without them would not have."""
    found, kept = [], []
    for twice in (False, True):
        network = AdaptedNetwork(backbone(kind, hidden_dropout_prob=0.1), rank=3).train()
        weights = adapter_weights(network)
        network.calibrate([batch], weights)
        if twice:
            network.gradient_checkpointing_enable()
        draw = torch.Generator().manual_seed(3)
        gates = [torch.rand(s, generator=draw) for s in (network.rank_gate_shape,
                                                         network.bit_gate_shape)]  # fmt: skip
        leaves = [t.clone().requires_grad_() for t in (weights, *gates)]
        sizes = {}
        torch.manual_seed(4)

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(batch, Latents(*leaves)).logsumexp(-1).sum()
        kept.append(sum(sizes.values()))
        loss.backward()
        parameters = [p for p in network.parameters() if p.requires_grad]
        found.append([loss, *(leaf.grad for leaf in (*leaves, *parameters))])
    assert all(gradient.abs().sum() > 0 for gradient in found[0])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-7)
    assert kept[1] < kept[0] / 2


def test_a_backbone_that_keeps_its_activations_says_so(backbone, monkeypatch):
    network = AdaptedNetwork(backbone(), rank=3)
    monkeypatch.setattr(type(network.backbone), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="does not support"):
        network.gradient_checkpointing_enable()
