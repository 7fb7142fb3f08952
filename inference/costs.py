"""Costs of a network before there is one: `bayes-lora costs --backbone NAME_FOLDER_OR_CONFIG`.

Parameters, multiply-accumulates, bit operations and bytes by layer and in all, with adapters of
full rank, at 32, 16 and any other bits. Only the configuration of the backbone is read; the
network is built on the meta device, so a model of any size takes seconds and no memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from bayes_lora.costs import (
    FULL_BITS,
    adapter_bytes,
    bit_operations,
    relative_bops,
    tensor_bits,
    uniform_bits,
)
from bayes_lora.errors import InputError, one_line
from bayes_lora.gates import level_bits
from bayes_lora.inference.backbone import DEMO, located
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.files import write_text
from bayes_lora.layers import TENSORS
from bayes_lora.network import AdaptedNetwork

WIDTHS = level_bits(3)  # 2, 4, 8, 16

KINDS = (
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
    (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification),
    (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),  # of a pair of stacks it has but one
)
"""What is built of a configuration: the first of these that its architecture has."""


def meta_network(
    backbone: str | None,
    rank: int,
    target_modules: str,
    quantized_tensors: Sequence[str] = TENSORS,
) -> AdaptedNetwork:
    """Build an adapted network that has shapes and no weights.

    It classifies texts or images, two classes, or is a language model: the first its architecture
    can.

    Parameters
    ----------
    backbone : str or None
        Model name on the hub, a folder with `config.json`, or such a file itself; None for
        `backbone.DEMO`.
    rank, target_modules, quantized_tensors
        As of `AdaptedNetwork`.

    Returns
    -------
    AdaptedNetwork
        On the meta device.

    Raises
    ------
    InputError
        If there is no such configuration, or no such network of its architecture.
    """
    name = located(backbone)
    try:
        config = AutoConfig.from_pretrained(name, num_labels=2, trust_remote_code=False)
        kinds = [kind for known, kind in KINDS if type(config) in known]
        if not kinds:
            raise ValueError(f"{config.model_type} neither classifies nor writes")
        with torch.device("meta"):
            model = kinds[0].from_config(config, trust_remote_code=False).float()
    except Exception as error:  # what a broken file raises depends on the library that reads it
        raise InputError(
            f"cannot build backbone {name!r} ({one_line(error)}): give a model of the hub, a "
            "folder or a config.json of a classifier or a language model"
        ) from error
    with torch.device("meta"):
        return AdaptedNetwork(
            model, rank=rank, target_modules=target_modules, quantized_tensors=quantized_tensors
        )


def costs(network: AdaptedNetwork, widths: Sequence[int]) -> dict[str, Any]:
    """Everything that the network costs at full rank, ready for JSON.

    Parameters
    ----------
    network : AdaptedNetwork
        On any device.
    widths : sequence of int
        Bits of all quantized tensors, of 2, 4, 8, 16, 32.

    Returns
    -------
    dict
        `network`: counts, and by width what depends on it, of the whole; `layers`: the same by
        layer. MACs and bit operations are per token, sizes in bytes.
    """
    base = getattr(network.backbone, "base_model", network.backbone)
    encoder = sum(p.numel() for p in base.parameters())
    head = sum(p.numel() for p in network.backbone.parameters() if p.requires_grad)
    rank, specs = network.rank, network.specs
    adapters = sum(rank * (s.in_features + s.out_features) for s in specs)
    frozen = [s.in_features * s.out_features for s in specs]
    layers: dict[str, dict[str, Any]] = {
        spec.path: {
            "in": spec.in_features,
            "out": spec.out_features,
            "macs": spec.frozen_macs + spec.uses * spec.num_weights(rank),
            "adapter_parameters": spec.num_weights(rank),
            "at_bits": {},
        }
        for spec in specs
    }
    whole: dict[str, Any] = {
        "encoder_parameters": encoder,
        "adapted_layers": len(specs),
        "lora_parameters": adapters,
        "scale_parameters": rank * len(specs),
        "head_parameters": head,
        "stacked_parameters": sum(p.numel() for p in _stacked(network)),
        "trainable_parameters": network.num_adapter_weights + head,
        "macs": sum(layer["macs"] for layer in layers.values()) + network.frozen_macs,
        "at_bits": {},
    }
    for width in widths:
        gate = None if width == FULL_BITS else uniform_bits(network, width)
        bops, size = (f(network, None, gate).double() for f in (bit_operations, adapter_bytes))
        weight_bytes = torch.tensor(frozen).double() * tensor_bits(network, gate)["weight"] / 8
        rest = float(network.frozen_macs * FULL_BITS**2)
        whole["at_bits"][width] = {
            "bit_operations": float(bops.sum()) + rest,
            "relative_bops_32": float(relative_bops(network, None, gate)),
            "relative_bops_16": float(relative_bops(network, None, gate, reference_bits=16)),
            "adapter_bytes": float(size.sum()),
            "adapted_weight_bytes": float(weight_bytes.sum()),
        }
        for layer, *values in zip(
            layers.values(), bops.tolist(), size.tolist(), weight_bytes.tolist(), strict=True
        ):
            names = ("bit_operations", "adapter_bytes", "weight_bytes")
            layer["at_bits"][width] = dict(zip(names, values, strict=True))
    return {"network": whole, "layers": layers}


def _stacked(network: AdaptedNetwork) -> Iterator[nn.Parameter]:
    """Weights of several matrices in one tensor; kernels of convolutions look like them."""
    for module in network.backbone.modules():
        if "conv" not in type(module).__name__.lower():
            yield from (p for p in module.parameters(recurse=False) if p.ndim == 3 and len(p) > 1)


def text(name: str, network: AdaptedNetwork, found: dict[str, Any]) -> str:
    """The costs as a person reads them; layers of the same kind and size share a line."""
    whole = found["network"]
    lines = [
        f"{name}: {whole['encoder_parameters']:,} parameters in the encoder",
        f"Adapters of rank {network.rank} on {whole['adapted_layers']} linear layers: "
        f"{whole['lora_parameters']:,} parameters in A and B, {whole['scale_parameters']:,} in e; "
        f"{whole['trainable_parameters']:,} are trained, the head's {whole['head_parameters']:,} "
        "among them",
        f"Quantized: {', '.join(network.quantized_tensors)}",
        "",
        f"{'layers':>6}  {'kind':32} {'in':>6} {'out':>6} {'MACs a token':>14} {'adapter':>10}",
    ]
    alike: dict[tuple[str, int, int, int], list[str]] = {}
    for spec in network.specs:
        size = spec.in_features, spec.out_features, spec.uses
        alike.setdefault((spec.kind, *size), []).append(spec.path)
    for (kind, columns, rows, _), paths in alike.items():
        one = found["layers"][paths[0]]
        lines.append(
            f"{len(paths):>6}  {kind:32} {columns:>6} {rows:>6} {one['macs']:>14,} "
            f"{one['adapter_parameters']:>10,}"
        )
    if network.frozen_macs:
        lines.append(f"        without an adapter, at 32 bits {network.frozen_macs:>30,}")
    lines += [f"        all together {whole['macs']:>47,}", ""]
    if whole["stacked_parameters"]:
        lines += [
            f"Not counted: {whole['stacked_parameters']:,} parameters of matrices in stacks, as "
            "experts have them; they get no adapter and are not quantized",
            "",
        ]
    lines.append(f"{'':32}" + "".join(f"{f'{bits} bits':>16}" for bits in whole["at_bits"]))
    for label, key, form in (
        ("bit operations a token", "bit_operations", ".4g"),
        ("relative to 32 x 32 bits", "relative_bops_32", ".2%"),
        ("relative to 16 x 16 bits", "relative_bops_16", ".2%"),
        ("bytes of the adapters", "adapter_bytes", ",.0f"),
        ("bytes of the weights they are on", "adapted_weight_bytes", ",.0f"),
    ):
        cells = (format(values[key], form) for values in whole["at_bits"].values())
        lines.append(f"{label:32}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def run(arguments: Sequence[str] | None = None) -> None:
    """Print the costs of the network that the command line describes, and write them as JSON."""
    parser = Parser(
        prog="bayes-lora costs", description="Costs of an adapted network.", allow_abbrev=False
    )
    named = f"name on the hub, folder, or config.json; default: {DEMO}"
    parser.add_argument("--backbone", help=named)
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument(
        "--target_modules", default="all-linear", help="as of finetune: all-linear, or a regex"
    )
    parser.add_argument(
        "--quantized_tensors", nargs="+", default=TENSORS, help=f"of {', '.join(TENSORS)}"
    )
    parser.add_argument(
        "--bits",
        type=int,
        default=8,
        choices=(*WIDTHS, FULL_BITS),
        help="a third width; 32 and 16 are shown too",
    )
    parser.add_argument("--json", type=Path, help="file for all costs, by layer as well")
    options = parser.parse_args(arguments)
    network = meta_network(
        options.backbone, options.rank, options.target_modules, options.quantized_tensors
    )
    found = costs(network, sorted({FULL_BITS, 16, options.bits}, reverse=True))
    print(text(options.backbone or DEMO, network, found))
    if options.json is not None:
        try:
            write_text(options.json, json.dumps(found, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {options.json}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
