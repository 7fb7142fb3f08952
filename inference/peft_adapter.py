r"""Adapters of PEFT: ours written as one of theirs, and theirs as a start for ours.

PEFT's LoRA adds (lora_alpha / r) B A x. With the scales e folded into A, a layer of rank r out of
R has r = rank and lora_alpha = alpha r / R, so that both have the factor alpha / R. Layers that
differ from the most common rank are in `rank_pattern` and `alpha_pattern`. PEFT knows no rank 0:
such layers are in `exclude_modules`.

The other way round, their B A is decomposed into singular vectors, the largest first, as nested
gates take components in that order; components beyond their rank start as new ones do.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bayes_lora.decided import DecidedLinear
from bayes_lora.errors import InputError
from bayes_lora.flat_weights import split_weights
from bayes_lora.inference.backbone import not_finite, rescale_head
from bayes_lora.inference.truncation import singular_components
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Regression
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.network import AdaptedNetwork

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # ways of PEFT to start an adapter
SAVED_BY_PEFT = {"classifier", "score"}  # heads that it saves without being told


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
def write_peft(
    model: PreTrainedModel, stock: PreTrainedModel, backbone: str, folder: Path
) -> nn.Module:
    """Write the adapter that `PeftModel.from_pretrained` puts on the backbone.

    Parameters
    ----------
    model : Module
        With decided layers and the trained head; that of a language model is pretrained.
    stock : PreTrainedModel
        The backbone as transformers loads it; it gets the adapters.
    backbone : str
        Its name, for adapter_config.json.
    folder : Path
        Gets adapter_config.json and adapter_model.safetensors.

    Returns
    -------
    Module
        The backbone with the adapter on.

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
    writes = model.get_output_embeddings() is not None
    saved = set() if writes else set(modules_to_save(model))
    reads_text = model.main_input_name == "input_ids"
    task_type = TaskType.SEQ_CLS if reads_text else None
    if writes:
        behind_encoder = model.config.is_encoder_decoder
        task_type = TaskType.SEQ_2_SEQ_LM if behind_encoder else TaskType.CAUSAL_LM
    empty = [path for path in layers if path not in kept]
    config = LoraConfig(
        task_type=task_type,
        base_model_name_or_path=backbone,
        r=common,
        lora_alpha=scaling * common,  # type: ignore[arg-type]  # PEFT divides, it may be a fraction
        target_modules=list(kept),
        exclude_modules="|".join(map(re.escape, empty)) or None,
        rank_pattern=odd,
        alpha_pattern={path: scaling * rank for path, rank in odd.items()},
        modules_to_save=sorted(saved - SAVED_BY_PEFT if reads_text else saved) or None,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(layer.base, Conv1D) for layer in kept.values()),
    )
    wrapped = get_peft_model(stock, config)
    config.base_model_name_or_path = backbone  # PEFT puts where it was loaded from
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
    return wrapped


def start_from_peft(folder: Path, model: BayesianLoRA, guide: GateGuide) -> tuple[str, ...]:
    """Put model and guide where a LoRA adapter of PEFT left off; errors are those of `read_peft`.

    A class is its number there: an adapter that was trained with its classes in another order
    starts with them in this one.

    Returns
    -------
    tuple of str
        Trained parameters that neither the adapter nor the pretrained model has: the head of an
        adapter that was saved without. They are drawn at random.
    """
    guide.loc.data, unknown = read_peft(folder, model.network, guide.loc.detach())
    likelihood = model.likelihood
    if isinstance(likelihood, Regression):  # theirs is in units of the labels
        center, spread = float(likelihood.center), float(likelihood.spread)
        backbone = cast(PreTrainedModel, model.network.backbone)
        rescale_head(backbone, 1 / spread, -center / spread)
    return unknown


@torch.no_grad()
def read_peft(
    folder: Path, network: AdaptedNetwork, initial: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """Adapter weights with which a network computes what it does with a LoRA adapter of PEFT.

    Parameters
    ----------
    folder : Path
        With adapter_config.json and adapter_model.safetensors.
    network : AdaptedNetwork
        Its head, and whatever else of the backbone the adapter was saved with, is filled in place.
    initial : Tensor
        Flat vector, shape (P,), for what the adapter does not have.

    Returns
    -------
    tuple of Tensor and tuple of str
        Flat vector, shape (P,); and trained parameters of the backbone that are not in the adapter.

    Raises
    ------
    InputError
        If the folder holds no LoRA adapter, or one that this network cannot start from.
    """
    config, state = _read(folder)
    base = config.get("base_model_name_or_path")
    mine = str(cast(PreTrainedModel, network.backbone).config.name_or_path)
    if base and Path(base).name != Path(mine).name:
        other = f"{folder} was trained on {base}, this is {mine}"
        warnings.warn(f"{other}: it goes with the same weights only", stacklevel=3)
    weights = initial.clone()
    parts = split_weights(weights, network.specs, network.rank)
    places = {spec.path: part for spec, part in zip(network.specs, parts, strict=True)}
    adapted = (
        name.removesuffix(LORA_A).removesuffix(LORA_B)
        for name in state
        if name.endswith((LORA_A, LORA_B))
    )
    for path in dict.fromkeys(adapted):
        if lacks := [n for n in (path + LORA_A, path + LORA_B) if n not in state]:
            raise InputError(f"{folder} is damaged: it has no {lacks[0]}")
        lora_A, lora_B = state[path + LORA_A], state[path + LORA_B]
        if lora_A.ndim != 2 or lora_B.ndim != 2 or not 0 < len(lora_A) == lora_B.shape[1]:
            raise InputError(f"{folder} is damaged: A and B at {path} have no rank in common")
        rank = len(lora_A)
        if path not in places:
            raise InputError(
                f"{folder} adapts {path}: --target_modules leaves it out, or it is outside the "
                "repeated blocks, as a pooler, where there are no gates, or has another name here"
            )
        if rank > network.rank:
            raise InputError(f"{folder} has rank {rank} at {path}: give --rank {rank}")
        A, _, B = places[path]
        if lora_A.shape[1] != A.shape[1] or len(lora_B) != len(B):
            raise InputError(f"{folder} is for another backbone: {path} has another size there")
        left, values, right = singular_components(lora_A.double(), lora_B.double())
        factor = _scale(config, path, rank) / (network.alpha / network.rank)
        A[: len(values)] = values.sqrt()[:, None] * right
        B[:, : len(values)] = factor * left * values.sqrt()
    parameters = dict(network.backbone.named_parameters())
    unknown = tuple(n for n, p in parameters.items() if p.requires_grad and n not in state)
    for name, tensor in state.items():  # the head
        if name.endswith((LORA_A, LORA_B)):
            continue
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise InputError(f"{folder} has {name}, which does not fit this backbone and task")
        parameters[name].copy_(tensor)
        parameters[name].requires_grad_(True)  # part of the encoder or not, it was and is trained
    return weights, unknown


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder} holds no adapter that PEFT saved as safetensors ({error})"
        ) from error
    if not isinstance(config, dict) or not state:
        raise InputError(f"{folder} holds no adapter: one of its two files is empty")
    if bad := not_finite(state):
        raise InputError(f"{folder} is damaged: {bad} is not finite")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder} holds an adapter of type {config.get('peft_type')}, not LORA")
    for option in ("use_dora", "lora_bias", "layer_replication"):
        if config.get(option):
            raise InputError(f"{folder} has {option}, which these adapters do not have")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise InputError(f"{folder} was started by {start}, which changes the backbone's weights")
    if config.get("bias", "none") != "none":
        raise InputError(f"{folder} has trained biases, which these adapters do not have")
    return config, {name.removeprefix("base_model.model."): t for name, t in state.items()}


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Factor of B A in PEFT's layer."""
    patterns = config.get("alpha_pattern") or {}
    try:
        alphas = [a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", path)]
        alpha = float(alphas[0] if alphas else config["lora_alpha"])
    except (AttributeError, KeyError, TypeError, ValueError, re.error):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise InputError(f"adapter_config.json is damaged: it has no alpha for {path}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
