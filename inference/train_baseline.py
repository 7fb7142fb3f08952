"""Train a baseline as `finetune` trains Bayesian LoRA: same data, order, steps and likelihood."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import cast

import numpy as np
import pyro
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from bayes_lora.costs import FULL_BITS
from bayes_lora.errors import NumericalError
from bayes_lora.inference.baselines import Baseline, Setting, build
from bayes_lora.inference.batches import EndlessBatches, calibration_batches
from bayes_lora.inference.config import FinetuneConfig
from bayes_lora.inference.files import check_free, open_folder, write_tensors, write_text
from bayes_lora.inference.metrics import evaluate_predictions
from bayes_lora.inference.optimisation import warmed_up_then_linear
from bayes_lora.inference.phases import plan
from bayes_lora.inference.predict import predictions
from bayes_lora.inference.prepared import Prepared, prepare
from bayes_lora.inference.published import as_published
from bayes_lora.inference.train import CALIBRATION_BATCHES
from bayes_lora.inference.truncation import truncate
from bayes_lora.layers import TENSORS

OUTPUTS = ("config.yaml", "metrics.json", "ranks.json", "trained.safetensors")


def train_baseline(method: str, config: FinetuneConfig) -> dict[str, float]:
    """Train one of `BASELINES` by maximum likelihood; write the results to the output folder.

    Parameters
    ----------
    method : str
        A name in `BASELINES`.
    config : FinetuneConfig
        Data, network and training are looked at. All phases are one, but uniform bits begin, and
        have their ranges set, where those of Bayesian LoRA do.

    Returns
    -------
    dict of str to float
        What `metrics.json` holds, under the names that `finetune` gives.

    Raises
    ------
    InputError
        If data, backbone, method or output folder are not what they should be.
    NumericalError
        If training leaves the finite numbers.
    """
    started = time.monotonic()
    settings, folder = config.training, Path(config.training.output_dir)
    check_free(folder, OUTPUTS, settings.overwrite)
    pyro.set_rng_seed(settings.seed)
    pruning = None
    if method == "adalora_published":
        config, pruning = as_published(config)
    data = prepare(config)
    setting = replace(setting_of(config, data), pruning=pruning)
    baseline = build(method, setting)
    open_folder(folder, OUTPUTS)
    write_text(folder / "config.yaml", config.to_yaml([f"method: {method}"]))
    log_likelihood = _fit(baseline, config, data)
    metrics = judge(baseline, data) | {"log_likelihood": log_likelihood}
    _write_ranks(folder, setting, baseline)
    metrics["seconds"] = time.monotonic() - started
    write_tensors(folder / "trained.safetensors", trained(baseline.network, data.likelihood))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def truncated_lora(config: FinetuneConfig, task_folder: Path) -> dict[str, float]:
    """Cut the trained `lora` of a comparison down to the size of its `qr`, without training.

    Parameters
    ----------
    config : FinetuneConfig
        As that of `lora`, but for its own output folder.
    task_folder : Path
        Holds `lora/seed-S` and `qr/seed-S`.

    Returns
    -------
    dict of str to float
        As of `train_baseline`.
    """
    started = time.monotonic()
    cell, folder = f"seed-{config.training.seed}", Path(config.training.output_dir)
    size = json.loads((task_folder / "qr" / cell / "metrics.json").read_text(encoding="utf-8"))
    data = prepare(config)
    setting = setting_of(config, data)
    baseline = build("lora", setting)
    state = load_file(task_folder / "lora" / cell / "trained.safetensors")
    for name, parameter in trained(baseline.network, data.likelihood).items():
        parameter.data.copy_(state[name])
    by_path = truncate(baseline.network, size["adapter_parameters"])
    left = [by_path[f"base_model.model.{spec.path}"] for spec in setting.specs]
    sizes = (spec.in_features + spec.out_features for spec in setting.specs)
    macs = sum(rank * entries for rank, entries in zip(left, sizes, strict=True))
    cut = replace(baseline, ranks=lambda: left, relative_bops=lambda: setting.share(macs))
    open_folder(folder, OUTPUTS)
    write_text(folder / "config.yaml", config.to_yaml(["method: lora_svd"]))
    metrics = judge(cut, data) | {"seconds": time.monotonic() - started}
    _write_ranks(folder, setting, cut)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _write_ranks(folder: Path, setting: Setting, baseline: Baseline) -> None:
    """Of every adapter, by the path of its layer; nothing where there is no such thing."""
    if (ranks := baseline.ranks()) is not None:
        paths = (spec.path for spec in setting.specs)
        by_path = dict(zip(paths, ranks, strict=True))
        write_text(folder / "ranks.json", json.dumps(by_path, indent=2) + "\n")


def setting_of(config: FinetuneConfig, data: Prepared) -> Setting:
    """What the baselines are built for: the prepared backbone, as configured."""
    network = config.network

    def calibration() -> list[dict[str, Tensor]]:
        device = next(data.backbone.model.parameters()).device
        batches = islice(calibration_batches(data.batches), CALIBRATION_BATCHES)
        return [{k: v.to(device) for k, v in b.items() if k != "labels"} for b in batches]

    return Setting(
        data.backbone, network.rank, network.alpha, network.target_modules,
        data.steps(config.training.epochs), calibration, _calibrations(config, data),
        tuple(network.quantized_tensors),
    )  # fmt: skip


def _calibrations(config: FinetuneConfig, data: Prepared) -> list[int]:
    """Steps before which `finetune` sets the ranges of its quantizers; the first begins them."""
    settings = config.training
    shares = (settings.warmup_share, settings.anneal_share, settings.joint_share)
    phases = plan(data.steps(settings.epochs), shares, gated=True)
    starts = accumulate((phase.steps for phase in phases), initial=0)
    return [start for start, phase in zip(starts, phases, strict=False) if phase.gates != "open"]


def judge(baseline: Baseline, data: Prepared) -> dict[str, float]:
    """Metrics on the validation set, and the size of the baseline."""
    network, likelihood = baseline.network.eval(), data.likelihood
    device = next(network.parameters()).device
    found = predictions(
        lambda x: likelihood(network(**x).logits.float()), data.validation_batches, device
    )
    ranks, share = baseline.ranks(), baseline.relative_bops()
    metrics = evaluate_predictions(data.task, found, data.labels)
    metrics |= {
        "relative_bops_32": share,
        "relative_bops_16": 4 * share,
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }
    if ranks is not None:
        metrics["mean_rank"] = float(np.mean(ranks))
    return metrics | {
        f"mean_bits_{tensor}": float(baseline.bits.get(tensor, FULL_BITS)) for tensor in TENSORS
    }


def trained(network: nn.Module, likelihood: nn.Module) -> dict[str, Tensor]:
    """All that was trained, by name."""
    parts = {"network": network, "likelihood": likelihood}
    return {
        f"{part}.{name}": p
        for part, module in parts.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def _fit(baseline: Baseline, config: FinetuneConfig, data: Prepared) -> float:
    """Train; return the log likelihood of the training set over the last epoch, nats."""
    settings = config.training
    total = data.steps(settings.epochs)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    parameters = list(trained(baseline.network, data.likelihood).values())
    optimizer = AdamW(parameters, settings.learning_rate, weight_decay=0.0)
    scheduler = LambdaLR(optimizer, warmed_up_then_linear(total))
    network, likelihood, optimizer, loader = accelerator.prepare(
        baseline.network, data.likelihood, optimizer, data.batches
    )
    network.train()
    if settings.gradient_checkpointing:
        stock = cast(PreTrainedModel, baseline.network)
        stock.gradient_checkpointing_enable({"use_reentrant": False})
    found: list[float] = []
    batches = EndlessBatches(loader)
    with tqdm(total=total, disable=None, unit="step") as progress:
        for step in range(total):
            optimizer.zero_grad()
            log_likelihoods = []
            for batch in islice(batches, data.at_once):
                inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
                logits = network(**inputs).logits.float()
                log_likelihoods.append(likelihood(logits).log_prob(batch["labels"]).mean())
                loss = baseline.penalty() - log_likelihoods[-1]
                accelerator.backward(loss / data.at_once)
                if not torch.isfinite(loss):
                    raise NumericalError(
                        f"step {step}: loss not finite; try a lower --learning_rate"
                    )
            accelerator.unscale_gradients(optimizer)
            clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            scheduler.step()
            baseline.after_step(step)
            found.append(float(torch.stack(log_likelihoods).detach().mean()))
            progress.set_postfix_str(f"log lik {found[-1]:.3f} nats/example", refresh=False)
            progress.update()
    # it is judged as all methods are, without the autocast that training has put around it
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    last = found[-data.steps(1) :]
    return float(np.mean(last)) * len(data.train)
