"""Which layers of a transformers model are adapted, and which parameters stay trainable."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from bayes_lora.errors import InputError


@dataclass(frozen=True)
class LayerSpec:
    """Name and size of one adapted layer.

    Attributes
    ----------
    path : str
        Module path in the backbone; the coordinate `layer` of every result.
    in_features, out_features : int
        Size of the frozen weight.
    """

    path: str
    in_features: int
    out_features: int

    @property
    def block(self) -> str:
        """Path of the repeated block that the layer is in: `bert.encoder.layer.0`."""
        return re.match(r"(.*?\.\d+)?", self.path)[0]  # type: ignore[index]

    @property
    def kind(self) -> str:
        """Path within its block, the same for all blocks: `attention.self.query`."""
        return self.path[len(self.block) :].lstrip(".")

    def num_weights(self, rank: int) -> int:
        """Entries of A, e and B together."""
        return rank * (self.in_features + self.out_features + 1)


def linear_layers(backbone: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers inside the repeated blocks of the encoder, by their path in the backbone.

    The blocks are what the encoder keeps in an `nn.ModuleList`; embeddings, pooler and head
    are outside.
    """
    encoder = getattr(backbone, "base_model", backbone)
    blocks = [f"{p}." for p, m in backbone.named_modules() if isinstance(m, nn.ModuleList)]
    members = {id(module) for module in encoder.modules()}
    return {
        path: module
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) in members
        and any(path.startswith(block) for block in blocks)
    }


def select_targets(backbone: nn.Module, target_modules: str) -> dict[str, nn.Linear]:
    """Layers that `target_modules` names, by path.

    Raises
    ------
    InputError
        If the expression is malformed or matches none of the encoder's linear layers.
    """
    layers = linear_layers(backbone)
    if target_modules == "all-linear":
        chosen = layers
    else:
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise InputError(
                f"target_modules {target_modules!r} is no regular expression: {error}"
            ) from error
        chosen = {path: layer for path, layer in layers.items() if pattern.fullmatch(path)}
    if not chosen:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", path) for path in layers})
        raise InputError(
            f"target_modules {target_modules!r} matches no linear layer; there are "
            f"{', '.join(kinds) or 'none: adapters go on torch.nn.Linear in repeated blocks'} "
            "(a whole path must match, e.g. '.*query')"
        )
    return chosen


def freeze_encoder(backbone: nn.Module, but: Collection[str] = ()) -> None:
    """Freeze the encoder, `backbone.base_model`, but for the parameters of these names.

    The head outside the encoder stays trainable.
    """
    getattr(backbone, "base_model", backbone).requires_grad_(False)
    for name in but:
        backbone.get_parameter(name).requires_grad_(True)
