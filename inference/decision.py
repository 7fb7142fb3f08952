"""The decision of a run as a file: decision.json, the rank and the bits of every layer.

    {"layers": {PATH: {"components": [1, 2, 5], "bits": {"weight": 4, "input": 8, ...}}, ...},
     "by": "...", "relative_bops_32": 0.05, ...}

`components` counts from 1 and is left out where there are no rank gates; `bits` where there are no
bit gates. What follows the layers is for people: the rule that decided, and what it costs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bayes_lora.costs import totals
from bayes_lora.errors import InputError
from bayes_lora.gates import expected_bits
from bayes_lora.inference.files import write_text
from bayes_lora.models.model import Gates
from bayes_lora.network import AdaptedNetwork

MORE_PROBABLE_SIDE = "every gate at its more probable side"


def describe(network: AdaptedNetwork, gates: Gates) -> dict[str, dict[str, Any]]:
    """Components and bits of every layer, by its path.

    Parameters
    ----------
    network : AdaptedNetwork
        Names of layers and tensors.
    gates : Gates
        0 or 1, shapes (L, R) and (L, T, K).
    """
    layers: dict[str, dict[str, Any]] = {spec.path: {} for spec in network.specs}
    if gates.rank_gate is not None:
        for layer, on in zip(layers.values(), network.structure(gates.rank_gate), strict=True):
            layer["components"] = (on.nonzero().flatten() + 1).tolist()
    if gates.bit_gate is not None:
        for layer, bits in zip(
            layers.values(), expected_bits(gates.bit_gate).tolist(), strict=True
        ):
            layer["bits"] = dict(zip(network.quantized_tensors, map(int, bits), strict=True))
    return layers


def write_decision(path: Path, network: AdaptedNetwork, gates: Gates, by: str) -> None:
    """Write the file whole or not at all; parameters are those of `describe`, `by` is the rule."""
    content = {"layers": describe(network, gates), "by": by} | totals(network, *gates)
    write_text(path, json.dumps(content, indent=2) + "\n")


def decided_by(path: Path) -> str:
    """The rule by which it was decided, as the file says."""
    return str(json.loads(path.read_text(encoding="utf-8")).get("by", "unknown"))


def read_decision(path: Path, network: AdaptedNetwork) -> Gates:
    """Gates of 0 and 1 as the file says.

    Raises
    ------
    InputError
        If there is no such file, or it is not of this network.
    """
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        mine = [layers[spec.path] for spec in network.specs]
        rank = bits = None
        if "components" in mine[0]:
            rank = torch.zeros(network.rank_gate_shape)
            for gate, layer in zip(rank, mine, strict=True):
                if min(layer["components"], default=1) < 1:
                    raise ValueError("components count from 1")
                gate[[k - 1 for k in layer["components"]]] = 1.0
        if "bits" in mine[0]:
            widths = [[layer["bits"][t] for t in network.quantized_tensors] for layer in mine]
            levels = torch.tensor([[network.bits.index(b) for b in row] for row in widths])
            bits = (torch.arange(network.num_levels) < levels[..., None]).float()
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        )
        raise InputError(f"cannot read the decision in {path} ({reason})") from error
    return Gates(rank, bits)
