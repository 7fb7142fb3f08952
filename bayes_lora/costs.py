r"""What an adapted network costs, as a function of its gates.

With r the effective rank of a layer, sum_k g_k, and b_t the bits of its tensors:

    MACs(layer)  = out in + r (in + 1 + out)                    multiply-accumulates per token
    BOPs(layer)  = out in b_weight b_input                      the frozen weight
                 + r (in b_A b_input + b_e b_hidden + out b_B b_hidden)        the adapter
    bytes(layer) = r (in b_A + b_e + out b_B) / 8               of A, e and B; ranges not counted

as a multiply-accumulate of a b-bit with a c-bit number costs b c bit operations (BOPs). MACs and
BOPs of a layer that a forward pass applies at several depths (ALBERT) count at each. Linear
layers of the encoder without an adapter count at 32 x 32 bits. Embeddings, normalisations,
attention products and the head, which runs once a sequence, are left out, on both sides of every
ratio.

All three are multilinear in the gates. So they take draws, decisions, and open probabilities
alike; for the latter they are the exact expectation over gates that are open or closed,
independently, with these probabilities. Nothing is computed with the weights, so a network on the
meta device will do.

Sources: van Baalen et al., arXiv 2005.07093; Meo et al., arXiv 2406.13046.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bayes_lora.gates import expected_bits
from bayes_lora.layers import TENSORS
from bayes_lora.network import AdaptedNetwork
from bayes_lora.targets import LayerSpec

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
    full = torch.full((len(network.specs),), float(FULL_BITS), device=_device(bit_gate))
    bits = dict.fromkeys(TENSORS, full)
    if bit_gate is not None:
        bits |= zip(network.quantized_tensors, expected_bits(bit_gate).unbind(-1), strict=True)
    return bits


def uniform_bits(network: AdaptedNetwork, bits: int) -> Tensor:
    """Bit gates, shape (L, T, K), that give every quantized tensor the same bits.

    Raises
    ------
    ValueError
        If `bits` is none of the network's.
    """
    open_gates = torch.arange(network.num_levels) < network.bits.index(bits)
    return open_gates.float().expand(network.bit_gate_shape)


def adapter_parameters(network: AdaptedNetwork, rank_gate: Tensor | None = None) -> Tensor:
    """Entries of A, e and B that are in use, of every adapted layer.

    Parameters
    ----------
    network : AdaptedNetwork
        The layers and their sizes.
    rank_gate : Tensor or None
        Gates or open probabilities, shape (L, R); None for full rank.

    Returns
    -------
    Tensor
        Shape (L,), differentiable in the gates.
    """
    rows, columns = _sizes(network, _device(rank_gate))
    return _rank(network, rank_gate) * (columns + 1 + rows)


def macs(network: AdaptedNetwork, rank_gate: Tensor | None = None) -> Tensor:
    """Multiply-accumulates per token of every adapted layer, shape (L,).

    Parameters are those of `adapter_parameters`: every use of a layer uses every entry once.
    """
    device = _device(rank_gate)
    rows, columns = _sizes(network, device)
    return _uses(network, device) * (rows * columns + adapter_parameters(network, rank_gate))


def adapter_bytes(
    network: AdaptedNetwork, rank_gate: Tensor | None = None, bit_gate: Tensor | None = None
) -> Tensor:
    """Bytes that A, e and B of every adapted layer take, without the ranges of their grids.

    Parameters are those of `bit_operations`; the result has shape (L,).

    Examples
    --------
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1,
    ...                     num_attention_heads=2, intermediate_size=16)
    >>> network = AdaptedNetwork(BertForSequenceClassification(config), rank=4)
    >>> adapter_bytes(network)[0], 4 * 4 * (8 + 1 + 8)
    (tensor(272.), 272)
    """
    bits = tensor_bits(network, bit_gate)
    device = _device(rank_gate, bit_gate)
    rows, columns = _sizes(network, device)
    A, e, B = (bits[tensor].to(device) for tensor in ("A", "e", "B"))
    return _rank(network, rank_gate).to(device) * (columns * A + e + rows * B) / 8


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
    device = _device(rank_gate, bit_gate)
    bits = {tensor: b.to(device) for tensor, b in tensor_bits(network, bit_gate).items()}
    rows, columns = _sizes(network, device)
    frozen = rows * columns * bits["weight"] * bits["input"]
    adapter = columns * bits["A"] * bits["input"] + (bits["e"] + rows * bits["B"]) * bits["hidden"]
    return _uses(network, device) * (frozen + _rank(network, rank_gate).to(device) * adapter)


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


def totals(
    network: AdaptedNetwork, rank_gate: Tensor | None = None, bit_gate: Tensor | None = None
) -> dict[str, float]:
    """Costs of the whole network, and its mean rank and bits.

    Parameters are those of `bit_operations`.

    Returns
    -------
    dict of str to float
        `relative_bops_32` and `relative_bops_16`, shares of the bit operations at 32 x 32 and at
        16 x 16 bits; `adapter_parameters`; `adapter_bytes`; over the layers, `mean_rank` and
        `mean_bits_<tensor>`.
    """
    bits = tensor_bits(network, bit_gate)
    return {
        "relative_bops_32": float(relative_bops(network, rank_gate, bit_gate)),
        "relative_bops_16": float(relative_bops(network, rank_gate, bit_gate, reference_bits=16)),
        "adapter_parameters": float(adapter_parameters(network, rank_gate).sum()),
        "adapter_bytes": float(adapter_bytes(network, rank_gate, bit_gate).sum()),
        "mean_rank": float(_rank(network, rank_gate).mean()),
        **{f"mean_bits_{tensor}": float(b.mean()) for tensor, b in bits.items()},
    }


def _device(*gates: Tensor | None) -> torch.device:
    """Where the gates are; that of the network does not matter, it may be meta."""
    return next((gate.device for gate in gates if gate is not None), torch.device("cpu"))


def _sizes(network: AdaptedNetwork, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the frozen weights, each of shape (L,)."""
    rows, columns, _ = _constants(tuple(network.specs), device)
    return rows, columns


def _uses(network: AdaptedNetwork, device: torch.device) -> Tensor:
    """How often a forward pass applies every layer, shape (L,)."""
    return _constants(tuple(network.specs), device)[2]


@lru_cache(maxsize=8)
def _constants(specs: tuple[LayerSpec, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Rows, columns and uses; kept, as each step asks for them, and a copy to a device waits."""
    sizes = [(spec.out_features, spec.in_features, spec.uses) for spec in specs]
    with torch.inference_mode(False):  # or nothing could be differentiated with them later
        return torch.tensor(sizes, dtype=torch.float32, device=device).unbind(-1)


def _rank(network: AdaptedNetwork, rank_gate: Tensor | None) -> Tensor:
    """Effective rank of every layer, shape (L,)."""
    if rank_gate is None:
        return torch.full((len(network.specs),), float(network.rank))
    return network.structure(rank_gate).sum(-1)
