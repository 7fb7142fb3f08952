"""Which layers of a transformers model are adapted, and which parameters stay trainable."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayes_lora.errors import InputError

LinearLayer = nn.Linear | Conv1D
"""What can be adapted; `Conv1D` is the linear layer of GPT-2."""


def weight_of(layer: LinearLayer) -> Tensor:
    """The weight of a linear layer, shape (out, in); what is written to it is in the layer.

    Examples
    --------
    >>> weight_of(nn.Linear(3, 2)).shape, weight_of(Conv1D(nf=2, nx=3)).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@dataclass(frozen=True)
class LayerSpec:
    """Name and size of one adapted layer.

    Attributes
    ----------
    path : str
        Module path in the backbone; the coordinate `layer` of every result.
    in_features, out_features : int
        Size of the frozen weight.
    uses : int
        How often a forward pass applies the layer.
    """

    path: str
    in_features: int
    out_features: int
    uses: int = 1

    @classmethod
    def of(cls, backbone: nn.Module, path: str, layer: LinearLayer) -> LayerSpec:
        """What there is to know of a layer of this backbone."""
        rows, columns = weight_of(layer).shape
        return cls(path, columns, rows, _uses(backbone, path))

    @property
    def block(self) -> str:
        """Path of the repeated block that the layer is in: `bert.encoder.layer.0`."""
        return re.match(r"(.*?\.\d+)?", self.path)[0]  # type: ignore[index]

    @property
    def kind(self) -> str:
        """Path within its block, the same for all blocks: `attention.self.query`."""
        return self.path[len(self.block) :].lstrip(".")

    @property
    def frozen_macs(self) -> int:
        """Multiply-accumulates per token of the frozen weight."""
        return self.uses * self.in_features * self.out_features

    def num_weights(self, rank: int) -> int:
        """Entries of A, e and B together."""
        return rank * (self.in_features + self.out_features + 1)


def _uses(backbone: nn.Module, path: str) -> int:
    """One, but in ALBERT, which goes through every group of its blocks at several depths."""
    config = getattr(backbone, "config", None)
    groups = getattr(config, "num_hidden_groups", None)
    if config is None or groups is None:
        return 1
    mine = int(re.search(r"\d+", path)[0])  # type: ignore[index]
    depths: int = config.num_hidden_layers
    return [int(depth / (depths / groups)) for depth in range(depths)].count(mine)


def linear_layers(backbone: nn.Module) -> dict[str, LinearLayer]:
    """Linear layers inside the repeated blocks of the encoder, by their path in the backbone.

    The blocks are what the encoder keeps in an `nn.ModuleList`; embeddings, pooler and head
    are outside. A layer that is in several places is there under every path.
    """
    encoder = getattr(backbone, "base_model", backbone)
    blocks = [f"{p}." for p, m in backbone.named_modules() if isinstance(m, nn.ModuleList)]
    members = {id(module) for module in encoder.modules()}
    return {
        path: module
        for path, module in backbone.named_modules(remove_duplicate=False)
        if isinstance(module, LinearLayer)
        and id(module) in members
        and any(path.startswith(block) for block in blocks)
    }


def select_targets(backbone: nn.Module, target_modules: str) -> dict[str, LinearLayer]:
    """Layers that `target_modules` names, by path.

    Raises
    ------
    InputError
        If the expression is malformed or matches none of the encoder's linear layers, or if a
        layer has its weight in common with another module.
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
    _refuse_shared(backbone, chosen)
    return chosen


def _refuse_shared(backbone: nn.Module, chosen: Mapping[str, LinearLayer]) -> None:
    """A weight on the grid of one layer would be another module's too, which has no adapter."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in backbone.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(path)
    for layer in chosen.values():
        if len(paths := owners[id(layer.weight)]) > 1:
            raise InputError(
                f"{' and '.join(paths)} share one weight, so none of them can have an adapter of "
                "its own: give target_modules an expression that leaves them out"
            )


def freeze_encoder(backbone: nn.Module, but: Collection[str] = ()) -> None:
    """Freeze the encoder, `backbone.base_model`, but for the parameters of these names.

    The head outside the encoder stays trainable, except that of a language model, which is
    pretrained.
    """
    getattr(backbone, "base_model", backbone).requires_grad_(False)
    of_words = getattr(backbone, "get_output_embeddings", lambda: None)()
    if of_words is not None:
        of_words.requires_grad_(False)
    for name in but:
        backbone.get_parameter(name).requires_grad_(True)
