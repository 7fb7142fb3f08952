"""Packed exports: every quantized tensor in its own bits, and what it takes to read it back.

packed.safetensors holds few, long tensors, so that its header is short:

    codes      uint8     of every layer, one after the other: [weight,] A, e, B, as `packing.pack`
                         stores them; a tensor of 32 bits as its float32 bytes
    limits     float32   the ranges of these grids, and of input and hidden
    module...  float32   by its path, whatever else is needed: the head, with the base all of it,
                         also the statistics of its normalisations

Shapes, ranks and bits are in bayes_lora.json (`layers`), which says where each tensor begins. The
frozen weight is left out unless the base is packed too: from the backbone's own its grid follows,
as it did in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayes_lora.decided import UNQUANTIZED, DecidedLinear, Grid
from bayes_lora.inference.files import write_tensors
from bayes_lora.layers import TENSORS
from bayes_lora.packing import pack, packed_size, unpack
from bayes_lora.ranges import searched_limits
from bayes_lora.targets import LinearLayer, weight_of

STORED = ("weight", "A", "e", "B")


def layout(layers: Mapping[str, DecidedLinear]) -> dict[str, dict[str, Any]]:
    """What bayes_lora.json says of every layer: its sizes, rank, scale and bits."""
    return {
        path: {
            "in": layer.weight.shape[1],
            "out": layer.weight.shape[0],
            "rank": layer.rank,
            "scaling": layer.scaling,
            "bits": layer.bits,
        }
        for path, layer in layers.items()
    }


def write_packed(
    path: Path, model: nn.Module, layers: Mapping[str, DecidedLinear], with_base: bool
) -> None:
    """Write packed.safetensors.

    Parameters
    ----------
    path : Path
        Of the file.
    model : Module
        The decided network.
    layers : mapping of str to DecidedLinear
        Its decided layers by path.
    with_base : bool
        Whether everything that is frozen is stored too.
    """
    codes, limits = [], []
    for layer in layers.values():
        for tensor in TENSORS:
            if tensor == "weight" and not with_base:
                continue
            grid = layer.grid(tensor)
            if tensor in layer.tensors:
                codes.append(_codes(layer.tensors[tensor], grid))
            if grid.bits != UNQUANTIZED:
                limits.append(grid.limit.flatten().float())
    weights = {f"{place}.base.weight" for place in layers}
    rest: dict[str, Tensor] = {
        name.replace(".base.bias", ".bias"): p
        for name, p in model.named_parameters()
        if name not in weights and (with_base or p.requires_grad)
    }
    if with_base:
        inside = tuple(f"{place}." for place in layers)
        rest |= {n: b for n, b in _kept_buffers(model).items() if not n.startswith(inside)}
    found = {"codes": torch.cat(codes), "limits": torch.cat([*limits, torch.empty(0)])}
    write_tensors(path, found | {f"module.{name}": p for name, p in rest.items()})


def _codes(values: Tensor, grid: Grid) -> Tensor:
    values = values.detach().float().contiguous()
    if grid.bits == UNQUANTIZED:
        return values.view(-1).view(torch.uint8)
    return pack(values, grid.limit, grid.bits)


@torch.no_grad()
def read_packed(
    state: Mapping[str, Tensor],
    model: nn.Module,
    sizes: Mapping[str, Mapping[str, Any]],
    with_base: bool,
) -> nn.Module:
    """Fill a backbone with what was packed.

    Parameters
    ----------
    state : mapping of str to Tensor
        Content of packed.safetensors.
    model : Module
        The stock backbone; if the base was not packed, with its pretrained weights. Its layers
        are replaced in place.
    sizes : mapping
        As of `layout`.
    with_base : bool
        As it was written.

    Returns
    -------
    Module
        `model`.

    Raises
    ------
    KeyError, RuntimeError
        If these do not belong together.
    """
    mine = {n.removeprefix("module."): t for n, t in state.items() if n.startswith("module.")}
    known = dict(model.named_parameters()) | _kept_buffers(model)
    packed = {f"{path}.weight" for path in sizes}
    if with_base and (lost := known.keys() - packed - mine.keys()):
        raise KeyError(min(lost))
    for name, stored in mine.items():
        if known[name].shape != stored.shape:
            raise RuntimeError(f"{name} has another shape")
        known[name].copy_(stored)
    codes, limits = _Parts(state["codes"]), _Parts(state["limits"])
    for path, size in sizes.items():
        base = cast(LinearLayer, model.get_submodule(path))
        weight = weight_of(base)
        rank, rows, columns = size["rank"], size["out"], size["in"]
        shapes = {
            "weight": ((rows, columns), (rows, 1)),
            "A": ((rank, columns), (rank, 1)),
            "e": ((rank,), (1,)),
            "B": ((rows, rank), (1, rank)),
            "input": ((), ()),
            "hidden": ((), ()),
        }
        values: dict[str, Tensor] = {}
        grids: dict[str, Grid] = {}
        for tensor, (shape, of_limit) in shapes.items():
            bits: int = size["bits"][tensor]
            grid = Grid() if bits == UNQUANTIZED else Grid(bits, torch.empty(of_limit))
            if tensor == "weight" and not with_base:
                if bits != UNQUANTIZED:
                    grid = Grid(bits, searched_limits(weight, (1,), (bits,))[0])
                weight.copy_(grid(weight))
            elif bits != UNQUANTIZED:
                grid = Grid(bits, limits.take(grid.limit.numel()).view(of_limit))
            grids[tensor] = grid
            if tensor in STORED and (tensor != "weight" or with_base):
                size_in_bytes = packed_size(torch.Size(shape).numel(), bits)
                values[tensor] = _values(codes.take(size_in_bytes), grid, shape)
        if with_base:
            weight.copy_(values["weight"])
        layer = DecidedLinear(base, values["A"], values["e"], values["B"], size["scaling"], grids)
        model.set_submodule(path, layer)
    if len(codes.rest) or len(limits.rest):
        raise RuntimeError("there are more codes, or limits, than bayes_lora.json tells of")
    return model


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has besides parameters, as the statistics of a normalisation."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


class _Parts:
    """Hands out a long tensor part by part; what is not there is a RuntimeError."""

    def __init__(self, whole: Tensor) -> None:
        self.rest = whole

    def take(self, count: int) -> Tensor:
        """The next so many entries."""
        part, self.rest = self.rest.split([count, len(self.rest) - count])
        return part


def _values(stored: Tensor, grid: Grid, shape: tuple[int, ...]) -> Tensor:
    if grid.bits == UNQUANTIZED:
        return stored.clone().view(torch.float32).view(shape)
    return unpack(stored, grid.limit, grid.bits, shape)
