r"""Bit operations of an adapted network, as a function of its gates.

A multiply-accumulate of a b-bit with a c-bit number costs b c bit operations (BOPs). Per token,

    BOPs(layer) = out in b_weight b_input                    the frozen weight
                + r (in b_A b_input + b_e b_hidden + out b_B b_hidden)        the adapter

with r the effective rank, sum_k g_k. Linear layers of the encoder without an adapter count at
32 x 32 bits. Embeddings, normalisations, attention products and the head, which runs once a
sequence, are left out, on both sides of every ratio.

The function is multilinear in the gates. So it takes draws, decisions, and open probabilities
alike; for the latter it is the exact expectation over gates that are open or closed,
independently, with these probabilities.

Sources: van Baalen et al., arXiv 2005.07093; Meo et al., arXiv 2406.13046.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_lora.gates import expected_bits
from bayes_lora.layers import TENSORS
from bayes_lora.network import AdaptedNetwork

FULL_BITS = 32


def tensor_bits(network: AdaptedNetwork, bit_gate: Tensor | None) -> dict[str, Tensor]:
    """Bits of every tensor of every layer; 32 for what is not quantized.

    Parameters
    ----------
    network : AdaptedNetwork
        Tells which tensors have gates.
    bit_gate : Tensor or None
        Gates or open probabilities, shape (L, T, K); None for no quantization.

    Returns
    -------
    dict of str to Tensor
        Mean bits under the level weights, by tensor kind, each of shape (L,).
    """
    layers = len(network.specs)
    device = network.device if bit_gate is None else bit_gate.device
    bits = {tensor: torch.full((layers,), float(FULL_BITS), device=device) for tensor in TENSORS}
    if bit_gate is not None:
        bits |= zip(network.quantized_tensors, expected_bits(bit_gate).unbind(-1), strict=True)
    return bits


def bit_operations(
    network: AdaptedNetwork, rank_gate: Tensor | None = None, bit_gate: Tensor | None = None
) -> Tensor:
    """Bit operations per token of every adapted layer.

    Parameters
    ----------
    network : AdaptedNetwork
        The layers and their sizes.
    rank_gate : Tensor or None
        Gates or open probabilities, shape (L, R); None for full rank.
    bit_gate : Tensor or None
        Gates or open probabilities, shape (L, T, K); None for 32 bits.

    Returns
    -------
    Tensor
        BOPs, shape (L,), differentiable in the gates.
    """
    bits = tensor_bits(network, bit_gate)
    if bit_gate is None and rank_gate is not None:  # what is compared lies with the gates
        bits = {tensor: value.to(rank_gate.device) for tensor, value in bits.items()}
    like = bits["weight"]
    rows = like.new_tensor([spec.out_features for spec in network.specs])
    columns = like.new_tensor([spec.in_features for spec in network.specs])
    rank: Tensor | float = float(network.rank)
    if rank_gate is not None:
        rank = network.structure(rank_gate).sum(-1)
    frozen = rows * columns * bits["weight"] * bits["input"]
    adapter = columns * bits["A"] * bits["input"] + (bits["e"] + rows * bits["B"]) * bits["hidden"]
    return frozen + rank * adapter


def relative_bops(
    network: AdaptedNetwork,
    rank_gate: Tensor | None = None,
    bit_gate: Tensor | None = None,
    reference_bits: int = 32,
) -> Tensor:
    """Bit operations of the network as a share of the same network at full rank.

    Parameters
    ----------
    network : AdaptedNetwork
        The layers and their sizes.
    rank_gate, bit_gate : Tensor or None
        As in `bit_operations`.
    reference_bits : int
        Width of every tensor in the reference; 32, or 16, where going from 32 to 16 bits no
        longer counts as a saving.

    Returns
    -------
    Tensor
        A share, of shape ().

    Examples
    --------
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1,
    ...                     num_attention_heads=2, intermediate_size=16)
    >>> network = AdaptedNetwork(BertForSequenceClassification(config), rank=4)
    >>> relative_bops(network, bit_gate=torch.ones(network.bit_gate_shape))  # 16 bits
    tensor(0.2500)
    """
    used = bit_operations(network, rank_gate, bit_gate).sum()
    full = bit_operations(network).sum().to(used.device) * (reference_bits / FULL_BITS) ** 2
    rest = network.frozen_macs * FULL_BITS**2
    return (used + rest) / (full + network.frozen_macs * reference_bits**2)
