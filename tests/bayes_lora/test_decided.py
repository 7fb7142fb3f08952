"""A decided network computes what the adapted one computes with gates of 0 and 1."""

import pytest
import torch

from bayes_lora.decided import DecidedLinear, decide_network
from bayes_lora.gates import independent
from bayes_lora.network import AdaptedNetwork, Latents
from bayes_lora.quantization import quantize


def decision(network, seed=5):
    """Gates of 0 and 1 that differ by layer and tensor; one layer has rank 0, one full rank."""
    generator = torch.Generator().manual_seed(seed)
    rank = (torch.rand(network.rank_gate_shape, generator=generator) < 0.6).float()
    rank[0], rank[1] = 0.0, 1.0
    bits = (torch.rand(network.bit_gate_shape, generator=generator) < 0.7).float()
    return rank, bits


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta"])
@pytest.mark.parametrize("structure", ["nested", "independent"])
def test_logits_are_those_of_the_gated_network(kind, structure, backbone, batch, adapter_weights):
    network = AdaptedNetwork(
        backbone(kind), rank=3, alpha=6.0,
        **({"structure": independent} if structure == "independent" else {}),
    ).eval()  # fmt: skip
    weights = adapter_weights(network)
    network.calibrate([batch], weights)
    rank, bits = decision(network)
    with torch.no_grad():
        for gates in ((rank, bits), (rank, None), (None, bits), (None, None)):
            wanted = network(batch, Latents(weights, *gates))
            again = AdaptedNetwork(
                backbone(kind), rank=3, alpha=6.0, structure=network.structure
            ).eval()
            again.load_state_dict(network.state_dict())
            decided = decide_network(again, weights, *gates)
            torch.testing.assert_close(decided(**batch).logits, wanted, rtol=1e-5, atol=1e-5)


def test_ranks_bits_and_grids_are_those_decided(network, adapter_weights):
    rank, bits = decision(network)
    ranks = network.structure(rank).sum(-1).long().tolist()
    widths = [[2 ** (1 + int(g.cumprod(-1).sum())) for g in layer] for layer in bits]
    specs, tensors = network.specs, network.quantized_tensors
    found = decide_network(network, adapter_weights(network), rank, bits)
    layers = [found.get_submodule(spec.path) for spec in specs]
    assert all(isinstance(layer, DecidedLinear) for layer in layers)
    assert [layer.rank for layer in layers] == ranks
    assert [[layer.bits[t] for t in tensors] for layer in layers] == widths
    for layer in layers:
        for name, value in layer.tensors.items():
            grid = layer.grid(name)
            assert torch.equal(quantize(value, grid.limit, grid.bits), value)


def test_merged_layers_compute_the_same_where_no_activation_is_quantized(
    backbone, batch, adapter_weights
):
    network = AdaptedNetwork(
        backbone(), rank=3, alpha=6.0, quantized_tensors=("weight", "A", "B")
    ).eval()
    weights = adapter_weights(network)
    network.calibrate([batch], weights)
    rank, bits = decision(network)
    with torch.no_grad():
        wanted = network(batch, Latents(weights, rank, bits))
    specs = network.specs
    found = decide_network(network, weights, rank, bits)
    for spec in specs:
        found.set_submodule(spec.path, found.get_submodule(spec.path).merged())
    with torch.no_grad():
        torch.testing.assert_close(found(**batch).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_gate_that_is_neither_open_nor_closed_is_refused(network, adapter_weights):
    rank, bits = decision(network)
    rank[2, 1] = 0.5
    with pytest.raises(ValueError, match="gates of 0 and 1"):
        decide_network(network, adapter_weights(network), rank, bits)


def test_everything_goes_where_the_layer_goes(network, adapter_weights):
    specs = network.specs
    decided = decide_network(network, adapter_weights(network), *decision(network)).to("meta")
    for spec in specs:
        layer = decided.get_submodule(spec.path)
        tensors = [*layer.tensors.values(), *(layer.grid(name).limit for name in layer.bits)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
