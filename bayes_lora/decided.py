r"""A network at decided ranks and bits: plain tensors, nothing random, no gates.

Every adapted layer becomes, with r of R components and tensors already on their grids,

    y = W Q(x) + (alpha / R) B ( e * Q( A Q(x) ) ) + bias,        A (r, in), e (r,), B (out, r),

where Q of the activations is all that is left to do. It computes what `AdaptedLinear` computes
with gates of 0 and 1, and is what an export writes down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bayes_lora.gates import level_weights
from bayes_lora.layers import TENSORS, AdaptedLinear, LayerLatents
from bayes_lora.network import AdaptedNetwork, Latents
from bayes_lora.quantization import quantize
from bayes_lora.ranges import gaussian_limits
from bayes_lora.targets import LinearLayer, weight_of

UNQUANTIZED = 32


class Grid(NamedTuple):
    """Where the values of a tensor lie: `quantize(x, limit, bits)`; 32 bits are no grid.

    Attributes
    ----------
    bits : int
        2, 4, 8, 16 or 32.
    limit : Tensor
        Range, broadcastable to the tensor; empty at 32 bits.
    """

    bits: int = UNQUANTIZED
    limit: Tensor = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Values of `x` on the grid."""
        return x if self.bits == UNQUANTIZED else quantize(x, self.limit, self.bits)


class DecidedLinear(nn.Module):
    """One adapted layer at decided rank and bits.

    Parameters
    ----------
    base : nn.Linear or Conv1D
        With the weight of the layer, on its grid.
    lora_A, lora_e, lora_B : Tensor
        The adapter's components that are in use, on their grids: (r, in), (r,), (out, r).
    scaling : float
        alpha / R.
    grids : mapping of str to Grid
        By tensor, all of `TENSORS`; those of activations are applied, the others only say where
        the values lie.

    Attributes
    ----------
    bits : dict of str to int
        Of every tensor.

    Examples
    --------
    >>> one = DecidedLinear(nn.Linear(3, 2), torch.ones(1, 3), torch.ones(1), torch.ones(2, 1),
    ...                     scaling=2.0, grids=dict.fromkeys(TENSORS, Grid()))
    >>> one.rank, (one(torch.ones(1, 3)) - one.base(torch.ones(1, 3))).detach()
    (1, tensor([[6., 6.]]))
    """

    lora_A: Tensor
    lora_e: Tensor
    lora_B: Tensor

    def __init__(
        self,
        base: LinearLayer,
        lora_A: Tensor,
        lora_e: Tensor,
        lora_B: Tensor,
        scaling: float,
        grids: Mapping[str, Grid],
    ) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.bits = {tensor: grid.bits for tensor, grid in grids.items()}
        # buffers, so that they go where the layer goes
        for name, value in (("lora_A", lora_A), ("lora_e", lora_e), ("lora_B", lora_B)):
            self.register_buffer(name, value)
        for tensor, grid in grids.items():
            self.register_buffer(f"{tensor}_limit", grid.limit)

    @property
    def weight(self) -> Tensor:
        """The weight on its grid, shape (out, in); some networks look at its type."""
        return weight_of(self.base)

    @property
    def rank(self) -> int:
        """Components that are in use."""
        return len(self.lora_e)

    def grid(self, tensor: str) -> Grid:
        """Where the values of a tensor lie."""
        return Grid(self.bits[tensor], self.get_buffer(f"{tensor}_limit"))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by their names in `TENSORS`."""
        return {"weight": self.weight, "A": self.lora_A, "e": self.lora_e, "B": self.lora_B}

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        x = self.grid("input")(x)
        y = self.base(x)
        if not self.rank:
            return y
        hidden = self.grid("hidden")(linear(x, self.lora_A))
        return y + linear(hidden * (self.scaling * self.lora_e), self.lora_B)

    @torch.no_grad()
    def merged(self) -> LinearLayer:
        """One linear layer, W + (alpha / R) B diag(e) A; it quantizes no activations."""
        self.weight.add_(self.scaling * (self.lora_B * self.lora_e) @ self.lora_A)
        return self.base


@torch.no_grad()
def decide_network(
    network: AdaptedNetwork,
    adapter_weights: Tensor,
    rank_gate: Tensor | None,
    bit_gate: Tensor | None,
) -> nn.Module:
    """Put decided layers in the place of adapted ones.

    Parameters
    ----------
    network : AdaptedNetwork
        Calibrated, if bits are decided. It is used up: its backbone is what comes back.
    adapter_weights : Tensor
        Flat vector, shape (P,).
    rank_gate, bit_gate : Tensor or None
        Gates of 0 and 1, shapes (L, R) and (L, T, K); None for full rank, and for no quantization.

    Returns
    -------
    Module
        The backbone, with a `DecidedLinear` at every adapted layer's path.

    Raises
    ------
    ValueError
        If a gate is neither 0 nor 1.
    """
    for gate in (rank_gate, bit_gate):
        if gate is not None and not ((gate == 0) | (gate == 1)).all():
            raise ValueError("a decision has gates of 0 and 1")
    latents = network.unpack(Latents(adapter_weights.detach(), rank_gate))
    levels = None if bit_gate is None else level_weights(bit_gate).argmax(-1).tolist()
    for index, (spec, mine) in enumerate(zip(network.specs, latents, strict=True)):
        layer = network.backbone.get_submodule(spec.path)
        assert isinstance(layer, AdaptedLinear)
        chosen = (
            {}
            if levels is None
            else dict(zip(network.quantized_tensors, levels[index], strict=True))
        )
        network.backbone.set_submodule(spec.path, _decided(layer, mine, chosen))
    return network.backbone


def _decided(
    layer: AdaptedLinear, latents: LayerLatents, levels: Mapping[str, int]
) -> DecidedLinear:
    A, e, B = latents.lora_A, latents.lora_e, latents.lora_B
    limits = {
        "weight": layer.weight_limits, "input": layer.input_limits, "hidden": layer.hidden_limits,
        "A": gaussian_limits(A, (1,), layer.bits),
        "e": gaussian_limits(e, (0,), layer.bits),
        "B": gaussian_limits(B, (0,), layer.bits),
    }  # fmt: skip
    grids = {
        tensor: Grid(layer.bits[levels[tensor]], limits[tensor][levels[tensor]])
        if tensor in levels
        else Grid()
        for tensor in TENSORS
    }
    A, e, B = (grids[tensor](value) for tensor, value in (("A", A), ("e", e), ("B", B)))
    layer.weight.copy_(grids["weight"](layer.weight))
    used = latents.component_weights
    if used is not None:
        on = used > 0
        A, e, B = A[on], e[on], B[:, on]
        for tensor, keep in (("A", grids["A"]), ("B", grids["B"])):
            if keep.bits != UNQUANTIZED:
                limit = keep.limit[on] if tensor == "A" else keep.limit[:, on]
                grids[tensor] = Grid(keep.bits, limit)
    return DecidedLinear(layer.base, A.clone(), e.clone(), B.clone(), layer.scaling, grids)
