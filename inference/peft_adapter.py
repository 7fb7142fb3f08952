r"""Adapters of PEFT: ours written as one of theirs.

PEFT's LoRA adds (lora_alpha / r) B A x. With the scales e folded into A, a layer of rank r out of
R has r = rank and lora_alpha = alpha r / R, so that both have the factor alpha / R. Layers that
differ from the most common rank are in `rank_pattern` and `alpha_pattern`. PEFT knows no rank 0:
such layers are in `exclude_modules`.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from bayes_lora.decided import DecidedLinear
from bayes_lora.errors import InputError


def decided_layers(model: nn.Module) -> dict[str, DecidedLinear]:
    """Layers at decided rank and bits, by their path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, DecidedLinear)}


def modules_to_save(model: nn.Module) -> list[str]:
    """Modules outside the encoder that have parameters, and what of the encoder is trained."""
    encoder = getattr(model, "base_model_prefix", "")
    names = {
        name.split(".")[0] if name.split(".")[0] != encoder else name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if name.split(".")[0] != encoder or parameter.requires_grad
    }
    return sorted(names)


@torch.no_grad()
def write_peft(model: nn.Module, stock: nn.Module, backbone: str, folder: Path) -> None:
    """Write the adapter that `PeftModel.from_pretrained` puts on the backbone.

    Parameters
    ----------
    model : Module
        With decided layers and the trained head.
    stock : Module
        The backbone as transformers loads it; it gets the adapters.
    backbone : str
        Its name, for adapter_config.json.
    folder : Path
        Gets adapter_config.json and adapter_model.safetensors.

    Raises
    ------
    InputError
        If PEFT is not installed, or every layer has rank 0.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise InputError("this format is PEFT's: pip install 'bayes-lora[compare]'") from error
    layers = decided_layers(model)
    kept = {path: layer for path, layer in layers.items() if layer.rank}
    if not kept:
        raise InputError("every layer has rank 0, which PEFT has no adapter for: choose merged")
    common = Counter(layer.rank for layer in kept.values()).most_common(1)[0][0]
    scaling = next(iter(kept.values())).scaling  # alpha / R, the same for all
    odd = {path: layer.rank for path, layer in kept.items() if layer.rank != common}
    saved = modules_to_save(model)
    empty = [path for path in layers if path not in kept]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        base_model_name_or_path=backbone,
        r=common,
        lora_alpha=scaling * common,  # type: ignore[arg-type]  # PEFT divides, it may be a fraction
        target_modules=list(kept),
        exclude_modules="|".join(map(re.escape, empty)) or None,
        rank_pattern=odd,
        alpha_pattern={path: scaling * rank for path, rank in odd.items()},
        modules_to_save=saved,
        lora_dropout=0.0,
    )
    wrapped = get_peft_model(stock, config)
    parameters = dict(wrapped.named_parameters())
    for path, layer in kept.items():
        prefix = f"base_model.model.{path}"
        parameters[f"{prefix}.lora_A.default.weight"].copy_(layer.lora_e[:, None] * layer.lora_A)
        parameters[f"{prefix}.lora_B.default.weight"].copy_(layer.lora_B)
    for name, parameter in model.named_parameters():
        for module in saved:
            if name.startswith(f"{module}."):
                rest = name.removeprefix(f"{module}.")
                mine = f"base_model.model.{module}.modules_to_save.default.{rest}"
                parameters[mine].copy_(parameter)
    wrapped.save_pretrained(str(folder))
