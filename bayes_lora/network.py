r"""Adapters in any transformers model, and the model as a function of (batch, latents).

The latents are few and wide, one tensor a kind with a layer axis:

    adapter_weights (P,)        A, e and B of all layers in one vector (`flat_weights`)
    rank_gate       (L, R)      z of every component
    bit_gate        (L, T, K)   z of every level of every quantized tensor

`AdaptedNetwork.unpack` is the one place where they are cut into per-layer views, and where
their shapes are checked: a gate of a wrong shape would broadcast in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayes_lora.calibration import sampled_inputs
from bayes_lora.errors import InputError
from bayes_lora.factors import quantize_factors
from bayes_lora.flat_weights import initial_weights, split_weights
from bayes_lora.gates import GateStructure, level_bits, level_weights, nested
from bayes_lora.layers import TENSORS, AdaptedLinear, LayerLatents
from bayes_lora.quantization import Mixture
from bayes_lora.targets import LayerSpec, freeze_encoder, linear_layers, select_targets

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Latents:
    """One draw of the latent variables of the whole network.

    Attributes
    ----------
    adapter_weights : Tensor
        Shape (P,).
    rank_gate : Tensor or None
        Shape (L, R), in [0, 1]; None keeps every component.
    bit_gate : Tensor or None
        Shape (L, T, K), in [0, 1]; None quantizes nothing.
    every_level : bool
        Differentiate in bit gates at 0 and 1 too, where hard concrete draws have no gradient, and
        exactly: not from a sample of the tokens.
    """

    adapter_weights: Tensor
    rank_gate: Tensor | None = None
    bit_gate: Tensor | None = None
    every_level: bool = False


class AdaptedNetwork(nn.Module):
    """A pretrained network with an adapter on every target layer, and a trainable head.

    The encoder, `backbone.base_model`, is frozen, its pooler included; the head outside it is
    trained. (With the pooler trained too, some runs at a learning rate of 1e-3 never left the
    majority class.)

    Parameters
    ----------
    backbone : nn.Module
        A transformers model with `base_model`. Its target layers are replaced in place.
    rank : int
        Components an adapter has at most, R >= 1.
    alpha : float
        Scale of the adapters; their output is multiplied by alpha / R.
    target_modules : str
        `all-linear`: every linear layer inside the encoder's repeated blocks. Otherwise a
        regular expression that must match a layer's whole path in the backbone.
    quantized_tensors : sequence of str
        Which of `TENSORS` have bit gates, T of them.
    num_levels : int
        Bit gates a tensor, K: widths 2, 4, ..., 2^(K+1).
    structure : {nested, independent}
        How rank gates weigh components.
    trained_parameters : collection of str
        Parameters of the encoder that are trained all the same, as those that a checkpoint
        lacks and that were drawn at random. None inside a target layer.

    Raises
    ------
    InputError
        If the rank is below one, a quantized tensor is unknown, or no layer matches.
    ValueError
        If the backbone has adapters already, or is not in float32.

    Examples
    --------
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=2,
    ...                     num_attention_heads=2, intermediate_size=16)
    >>> network = AdaptedNetwork(BertForSequenceClassification(config), rank=4)
    >>> len(network.specs), network.rank_gate_shape, network.bit_gate_shape
    (12, (12, 4), (12, 6, 3))
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: str = "all-linear",
        quantized_tensors: Sequence[str] = TENSORS,
        num_levels: int = 3,
        structure: GateStructure = nested,
        trained_parameters: Collection[str] = (),
    ) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"rank is {rank}: give at least 1")
        if unknown := set(quantized_tensors) - set(TENSORS):
            raise InputError(f"no such tensor: {sorted(unknown)}; there are {', '.join(TENSORS)}")
        self.rank, self.alpha, self.num_levels, self.structure = rank, alpha, num_levels, structure
        self.quantized_tensors = tuple(t for t in TENSORS if t in quantized_tensors)
        if any(isinstance(module, AdaptedLinear) for module in backbone.modules()):
            raise ValueError("this backbone has adapters already: load it anew")
        if not all(p.dtype == torch.float32 for p in backbone.parameters()):
            raise ValueError("the backbone must be in float32, backbone.float(); autocast the rest")
        inside = linear_layers(backbone)
        targets = select_targets(backbone, target_modules)
        self.frozen_macs = sum(
            LayerSpec.of(backbone, path, layer).frozen_macs
            for path, layer in inside.items()
            if path not in targets
        )
        freeze_encoder(backbone, but=trained_parameters)
        self.backbone = backbone
        self.specs: list[LayerSpec] = []
        self._layers: list[AdaptedLinear] = []
        for path, linear in targets.items():
            layer = AdaptedLinear(linear, alpha / rank, num_levels)
            backbone.set_submodule(path, layer)
            self._layers.append(layer)
            self.specs.append(LayerSpec.of(backbone, path, linear))

    @property
    def num_adapter_weights(self) -> int:
        """Length P of the flat vector `adapter_weights`."""
        return sum(spec.num_weights(self.rank) for spec in self.specs)

    @property
    def rank_gate_shape(self) -> tuple[int, int]:
        """Shape (L, R) of `rank_gate`."""
        return len(self.specs), self.rank

    @property
    def bit_gate_shape(self) -> tuple[int, int, int]:
        """Shape (L, T, K) of `bit_gate`."""
        return len(self.specs), len(self.quantized_tensors), self.num_levels

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.backbone.parameters()).device

    @property
    def bits(self) -> tuple[int, ...]:
        """Bit widths that the levels choose from."""
        return level_bits(self.num_levels)

    def initial_adapter_weights(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw the flat vector, shape (P,), with which the network equals the pretrained one."""
        return initial_weights(self.specs, self.rank, generator)

    def train(self, mode: bool = True) -> Self:
        """As of any module; but statistics that came with the frozen weights stay as they are."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def gradient_checkpointing_enable(self) -> None:
        """Compute the blocks' activations twice instead of keeping them; a ValueError if it cannot.

        A block that is computed again is lent what it was lent the first time.
        """
        settings = {"use_reentrant": False, "context_fn": self._again}
        self.backbone.gradient_checkpointing_enable(settings)  # type: ignore[operator]

    def _again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._lend([layer.latents for layer in self._layers])

    def unpack(self, latents: Latents) -> list[LayerLatents]:
        """Cut the wide latents into per-layer views.

        Returns
        -------
        list of LayerLatents
            One a layer, in the order of `specs`.

        Raises
        ------
        ValueError
            If a latent has another shape than this network's.
        """
        _check_shape("adapter_weights", latents.adapter_weights, (self.num_adapter_weights,))
        _check_shape("rank_gate", latents.rank_gate, self.rank_gate_shape)
        _check_shape("bit_gate", latents.bit_gate, self.bit_gate_shape)
        factors = split_weights(latents.adapter_weights, self.specs, self.rank)
        weights: Sequence[Tensor | None] = [None] * len(factors)
        if latents.rank_gate is not None:
            weights = self.structure(latents.rank_gate).unbind()
        mixtures: list[dict[str, Mixture]] = [{} for _ in factors]
        if latents.bit_gate is not None:
            mixtures = self._mixtures(latents.bit_gate, latents.every_level)
            factors = quantize_factors(factors, mixtures, self.bits)
        return [
            LayerLatents(*f, component_weights=w, mixtures=m, exact=latents.every_level)
            for f, w, m in zip(factors, weights, mixtures, strict=True)
        ]

    def _mixtures(self, bit_gate: Tensor, every_level: bool) -> list[dict[str, Mixture]]:
        weights = level_weights(bit_gate)
        levels = tuple(range(self.num_levels + 1)) if every_level else None
        on_host = (weights > 0).tolist()  # the only time that a draw is looked at
        return [
            {
                tensor: Mixture(w, tuple(i for i, on in enumerate(flags) if on), levels)
                for tensor, w, flags in zip(
                    self.quantized_tensors, layer_weights.unbind(), layer_flags, strict=True
                )
            }
            for layer_weights, layer_flags in zip(weights.unbind(), on_host, strict=True)
        ]

    def forward(self, batch: Batch, latents: Latents) -> Tensor:
        """Run the network with one draw of the latents.

        Parameters
        ----------
        batch : mapping of str to Tensor
            The backbone's keyword arguments.
        latents : Latents
            The draw; nothing of it is kept.

        Returns
        -------
        Tensor
            Logits, or predicted values, in float32: shape (batch, classes).
        """
        with self._lend(self.unpack(latents)):
            return self.backbone(**batch).logits.float()

    @contextmanager
    def _lend(self, latents: Iterable[LayerLatents | None]) -> Iterator[None]:
        try:
            for layer, mine in zip(self._layers, latents, strict=True):
                layer.latents = mine
            yield
        finally:
            for layer in self._layers:
                layer.latents = None

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[Batch], adapter_weights: Tensor, tokens_per_batch: int = 64
    ) -> None:
        """Set the ranges of all quantizers from activations of the unquantized network.

        Parameters
        ----------
        batches : iterable of mapping of str to Tensor
            A few batches of training data; none is a ValueError.
        adapter_weights : Tensor
            Flat vector, shape (P,).
        tokens_per_batch : int
            Tokens of every batch, padding left out, that the ranges are fitted to.
        """
        samples = sampled_inputs(
            self._layers, batches, lambda b: self(b, Latents(adapter_weights)), tokens_per_batch
        )
        factors = split_weights(adapter_weights, self.specs, self.rank)
        for layer, sample, (lora_A, _, _) in zip(self._layers, samples, factors, strict=True):
            layer.calibrate(sample, lora_A)


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, this network needs {shape}")
