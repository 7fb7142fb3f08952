"""Bit operations against counting by hand, and against enumeration in expectation."""

import itertools

import pytest
import torch

from bayes_lora.costs import (
    adapter_bytes,
    adapter_parameters,
    bit_operations,
    macs,
    relative_bops,
)
from bayes_lora.network import AdaptedNetwork


def test_bit_operations_of_one_layer_by_hand(backbone):
    network = AdaptedNetwork(backbone(num_hidden_layers=1), rank=3)
    rank_gate = torch.ones(network.rank_gate_shape)
    rank_gate[4] = torch.tensor([1.0, 1.0, 0.0])
    bit_gate = torch.zeros(network.bit_gate_shape)
    # intermediate.dense: 16 in, 24 out; bits 4, 8, 2, 16, 8, 4 for weight A e B input hidden
    for t, levels in enumerate((1, 2, 0, 3, 2, 1)):
        bit_gate[4, t, :levels] = 1
    frozen = 24 * 16 * 4 * 8
    adapter = 16 * 8 * 8 + 2 * 4 + 24 * 16 * 4
    assert float(bit_operations(network, rank_gate, bit_gate)[4]) == frozen + 2 * adapter


def test_parameters_macs_and_bytes_of_one_layer_by_hand(backbone):
    network = AdaptedNetwork(backbone(num_hidden_layers=1), rank=3, quantized_tensors=["A", "e"])
    rank_gate = torch.ones(network.rank_gate_shape)
    rank_gate[4] = torch.tensor([1.0, 1.0, 0.0])
    bit_gate = torch.zeros(network.bit_gate_shape)
    bit_gate[4, 0, :2] = 1  # A of 8 bits, e of 2, B is not quantized
    assert float(adapter_parameters(network, rank_gate)[4]) == 2 * (16 + 1 + 24)
    assert float(macs(network, rank_gate)[4]) == 24 * 16 + 2 * (16 + 1 + 24)
    assert float(adapter_bytes(network, rank_gate, bit_gate)[4]) == 2 * (16 * 8 + 2 + 24 * 32) / 8
    assert int(adapter_parameters(network).sum()) == network.num_adapter_weights


def test_plain_lora_is_the_reference_and_16_bits_a_quarter_of_it(network):
    sixteen = torch.ones(network.bit_gate_shape)
    assert float(relative_bops(network)) == 1
    assert float(relative_bops(network, bit_gate=sixteen)) == 0.25
    assert float(relative_bops(network, bit_gate=sixteen, reference_bits=16)) == 1


def test_layers_without_an_adapter_count_in_full(backbone):
    network = AdaptedNetwork(backbone(), rank=1, target_modules=".*query")
    frozen, adapter = 16 * 16, 16 + 1 + 16
    rest = 3 * 16 * 16 + 2 * 16 * 24
    expected = ((frozen + adapter) * 256 + rest * 1024) / ((frozen + adapter + rest) * 1024)
    found = float(relative_bops(network, bit_gate=torch.ones(network.bit_gate_shape)))
    assert found == pytest.approx(expected, rel=1e-6)


def test_open_probabilities_give_the_exact_expectation(backbone):
    network = AdaptedNetwork(
        backbone(num_hidden_layers=1),
        rank=2,
        target_modules=".*query",
        quantized_tensors=["weight", "B"],
        num_levels=2,
    )
    p_rank = torch.tensor([[0.9, 0.3]])
    p_bits = torch.tensor([[[0.8, 0.4], [0.6, 0.1]]])
    expected, expected_bytes = torch.zeros(()), torch.zeros(1)
    for values in itertools.product([0.0, 1.0], repeat=6):
        z = torch.tensor(values)
        p = torch.cat([p_rank.flatten(), p_bits.flatten()])
        probability = torch.where(z > 0, p, 1 - p).prod()
        gates = z[:2].view(1, 2), z[2:].view(1, 2, 2)
        expected += probability * relative_bops(network, *gates)
        expected_bytes += probability * adapter_bytes(network, *gates)
    torch.testing.assert_close(adapter_bytes(network, p_rank, p_bits), expected_bytes)
    torch.testing.assert_close(relative_bops(network, p_rank, p_bits), expected)
