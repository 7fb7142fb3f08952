r"""One linear layer with one low-rank adapter, gated and quantized.

For input x (..., in), frozen weight W (out, in), adapter A (R, in), e (R,), B (out, R),
component weights g (R,) and quantizers Q, one a tensor,

    y = Q(W) Q(x) + (alpha / R) Q(B) ( Q(e) * g * Q( Q(A) Q(x) ) ) + bias.

The layer owns the frozen weight and the ranges of its quantizers, nothing else. A, e, B, the
gates and the level weights are latents: they are lent to the layer for one forward pass, the first
three as quantized (`factors`).

Sources: Hu et al., arXiv 2106.09685 (adapters); Zhang et al., arXiv 2303.10512 (A, e, B);
Meo et al., arXiv 2406.13046 (gates on rank and bits).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bayes_lora.gates import level_bits
from bayes_lora.quantization import Mixture, quantize_mixture
from bayes_lora.ranges import largest_value, searched_limits
from bayes_lora.row_sample import linear_of_mixture
from bayes_lora.targets import LinearLayer, weight_of

TENSORS = ("weight", "A", "e", "B", "input", "hidden")
"""The tensors of an adapted layer that can be quantized, in the order of `bit_gate`."""

SEARCH_SAMPLE = 30_000  # activations that a range is searched with; their largest is of all


@dataclass(frozen=True)
class LayerLatents:
    """What one adapted layer is lent for one forward pass.

    Attributes
    ----------
    lora_A : Tensor
        Q(A), shape (R, in).
    lora_e : Tensor
        Q(e), shape (R,).
    lora_B : Tensor
        Q(B), shape (out, R).
    component_weights : Tensor or None
        Weights g of the components, shape (R,); None leaves all components on.
    mixtures : mapping of str to Mixture
        How `weight`, `input` and `hidden` are quantized; a tensor that is absent is not.
    exact : bool
        Sum the gradient of level weights over all tokens. Otherwise that of `weight` and `input`
        is estimated from some of them, without bias (`row_sample`).
    """

    lora_A: Tensor
    lora_e: Tensor
    lora_B: Tensor
    component_weights: Tensor | None = None
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)
    exact: bool = False


class AdaptedLinear(nn.Module):
    """A frozen linear layer that applies the adapter it is lent.

    Without latents it is the plain linear layer.

    Parameters
    ----------
    base : nn.Linear or Conv1D
        The pretrained layer; its parameters are kept, frozen.
    scaling : float
        alpha / R.
    num_levels : int
        Bit gates a tensor, K: ranges are kept for K + 1 levels.

    Attributes
    ----------
    weight_limits : Tensor
        Ranges of the frozen weight, one an output row: shape (K + 1, out, 1).
    input_limits, hidden_limits : Tensor
        Ranges of the activations, one a tensor: shape (K + 1,).

    Examples
    --------
    >>> import torch
    >>> layer = AdaptedLinear(torch.nn.Linear(3, 2), scaling=2.0, num_levels=3)
    >>> x = torch.ones(1, 3)
    >>> plain = layer(x)
    >>> A, e, B = torch.ones(1, 3), torch.ones(1), torch.ones(2, 1)
    >>> layer.latents = LayerLatents(A, e, B)
    >>> (layer(x) - plain).detach().round(decimals=4)
    tensor([[6., 6.]])
    """

    weight_limits: Tensor
    input_limits: Tensor
    hidden_limits: Tensor

    def __init__(self, base: LinearLayer, scaling: float, num_levels: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = scaling
        self.bits = level_bits(num_levels)
        self.latents: LayerLatents | None = None
        self._numbers: dict[str, tuple[Tensor, int, tuple[float, ...]]] = {}
        levels, device = num_levels + 1, base.weight.device
        unknown = torch.full((levels,), torch.inf, device=device)
        self.register_buffer("weight_limits", unknown[:, None, None].repeat(1, len(self.weight), 1))
        self.register_buffer("input_limits", unknown)
        self.register_buffer("hidden_limits", unknown.clone())

    @property
    def weight(self) -> Tensor:
        """The frozen weight, shape (out, in); some networks look at its type."""
        return weight_of(self.base)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, shape (out,)."""
        return self.base.bias

    @property
    def calibrated(self) -> bool:
        """Whether all ranges are set, by `calibrate` or with a saved state."""
        return all(map(math.isfinite, self._on_host("hidden_limits")))

    def _on_host(self, name: str) -> tuple[float, ...]:
        """Ranges of the activations as numbers, asked of the device when they have changed."""
        limits = self.get_buffer(name)
        of, version, numbers = self._numbers.get(name, (None, 0, ()))
        if of is not limits or version != limits._version:
            numbers = tuple(limits.tolist())
            self._numbers[name] = limits, limits._version, numbers
        return numbers

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        latents = self.latents
        if latents is None:
            return self.base(x)
        weight = self.weight
        mixtures = latents.mixtures
        if mixtures and not self.calibrated:
            raise RuntimeError("quantizers have no ranges yet: call the network's calibrate first")
        if "input" in mixtures:
            x = quantize_mixture(
                x, self.input_limits, mixtures["input"], not latents.exact,
                self._on_host("input_limits"),
            )  # fmt: skip
        if x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for W and for A
        if "weight" in mixtures:
            weight = quantize_mixture(weight, self.weight_limits, mixtures["weight"])
        hidden = linear(x, latents.lora_A)
        if "hidden" in mixtures:  # few features: to draw tokens would take longer than to sum
            hidden = quantize_mixture(
                hidden, self.hidden_limits, mixtures["hidden"],
                numbers=self._on_host("hidden_limits"),
            )  # fmt: skip
        gain = self.scaling * latents.lora_e
        if latents.component_weights is not None:
            gain = gain * latents.component_weights
        map_frozen = linear if latents.exact else linear_of_mixture
        y = linear(hidden * gain, latents.lora_B)
        return y.add_(map_frozen(x, weight, self.base.bias))

    @torch.no_grad()
    def calibrate(self, inputs: Tensor, lora_A: Tensor) -> None:
        """Set every range to the one of least squared error; those of the weight the first time.

        Parameters
        ----------
        inputs : Tensor
            A sample of this layer's inputs, shape (tokens, in).
        lora_A : Tensor
            The adapter's first matrix, shape (R, in), from which the hidden sample follows.
        """
        if not self.calibrated:  # the weight is frozen: once is enough
            weight = self.weight
            # FSDP shares it out, but in forward passes; to import its type would take seconds
            if hasattr(weight, "full_tensor"):
                weight = weight.full_tensor()
            self.weight_limits.copy_(searched_limits(weight, (1,), self.bits))
        draw = torch.Generator().manual_seed(0)
        for limits, sample in (
            (self.input_limits, inputs.flatten()),
            (self.hidden_limits, linear(inputs, lora_A).flatten()),
        ):
            # drawn, for a stride would see the same few features of every token
            chosen = torch.randint(len(sample), (SEARCH_SAMPLE,), generator=draw)
            some = sample[chosen.to(sample.device)]
            limits.copy_(searched_limits(some, (0,), self.bits, largest_value(sample, (0,)))[:, 0])
