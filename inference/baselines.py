r"""What Bayesian LoRA is compared with, as networks that are trained by maximum likelihood.

    full                    every weight
    bitfit                  bias vectors                                 arXiv 2106.10199
    houlsby                 bottlenecks behind attention and MLP         arXiv 1902.00751
    pfeiffer                bottlenecks behind the MLP                   arXiv 2005.00247
    lora                    A and B of one rank everywhere (PEFT)        arXiv 2106.09685
    adalora                 ranks pruned by importance (PEFT)            arXiv 2303.10512
    adalora_published       the same, with the authors' settings (`published.py`)
    lora_8bit, lora_4bit    all tensors that Bayesian LoRA quantizes, at one bit width

All train the head, and of the encoder what is named. Bottlenecks are as wide as makes them as large
as LoRA's adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bayes_lora.costs import relative_bops, uniform_bits
from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import Backbone
from bayes_lora.inference.published import AdaLoRASettings
from bayes_lora.layers import TENSORS
from bayes_lora.network import AdaptedNetwork, Batch, Latents
from bayes_lora.targets import (
    LayerSpec,
    LinearLayer,
    freeze_encoder,
    linear_layers,
    select_targets,
    weight_of,
)

ADALORA_INITIAL = 1.5  # times the rank, as the authors have it
ADALORA_SCHEDULE = (0.1, 0.3)  # of the steps: before pruning starts, after it has ended
PRUNINGS = 50
ORTHOGONALITY = 0.1  # weight of AdaLoRA's regularizer


@dataclass
class Baseline:
    """A network, and what its training does besides a step of the optimizer.

    Attributes
    ----------
    network : Module
        Gives an output with `logits`.
    relative_bops : function
        Its bit operations as a share of those of 32 x 32 bit LoRA of full rank.
    ranks : function
        Rank of every adapter, or None where there is no such thing.
    bits : mapping of str to int
        Of every quantized tensor.
    penalty : function
        Added to the loss, in nats per example.
    after_step : function
        Called with the step, counted from 0, while the gradients are still there.
    """

    network: nn.Module
    relative_bops: Callable[[], float]
    ranks: Callable[[], Sequence[int] | None] = lambda: None
    bits: Mapping[str, int] = field(default_factory=dict)
    penalty: Callable[[], Tensor | float] = lambda: 0.0
    after_step: Callable[[int], None] = lambda step: None


@dataclass
class Setting:
    """What a baseline is built for.

    Attributes
    ----------
    backbone : Backbone
        As from `load_backbone`; its model is changed in place.
    rank, alpha, target_modules
        Of the adapters, as of `AdaptedNetwork`.
    steps : int
        Of the whole training.
    calibration : function
        Gives a few batches of inputs, to set the ranges of quantizers with.
    calibrations : sequence of int
        Steps before which the ranges of quantizers are set; with the first, quantization begins.
    quantized_tensors : sequence of str
        Of uniform bits.
    pruning : AdaLoRASettings, optional
        Of AdaLoRA; default: by rank and steps.
    """

    backbone: Backbone
    rank: int
    alpha: float
    target_modules: str
    steps: int
    calibration: Callable[[], Iterable[Batch]]
    calibrations: Sequence[int]
    quantized_tensors: Sequence[str] = TENSORS
    pruning: AdaLoRASettings | None = None

    def __post_init__(self) -> None:
        model = self.backbone.model
        self.linear = linear_layers(model)
        self.specs = [
            LayerSpec.of(model, path, layer)
            for path, layer in select_targets(model, self.target_modules).items()
        ]
        self.macs = sum(layer.weight.numel() for layer in self.linear.values())
        self.lora_parameters = sum(self.rank * (s.in_features + s.out_features) for s in self.specs)

    def share(self, adapter_macs: float) -> float:
        """Relative bit operations at 32 bits, of adapters with so many MACs per token."""
        full = sum(spec.num_weights(self.rank) for spec in self.specs)
        return (self.macs + adapter_macs) / (self.macs + full)


def build(method: str, setting: Setting) -> Baseline:
    """Make one of `BASELINES`.

    Raises
    ------
    InputError
        If the method cannot be put on this backbone, or AdaLoRA has too few steps.
    """
    freeze_encoder(setting.backbone.model, but=setting.backbone.new_parameters)
    return BASELINES[method](setting)


def _full(setting: Setting) -> Baseline:
    setting.backbone.model.requires_grad_(True)
    return Baseline(setting.backbone.model, lambda: setting.share(0))


def _bitfit(setting: Setting) -> Baseline:
    biases = [p for n, p in setting.backbone.model.named_parameters() if n.endswith("bias")]
    if not biases:
        raise InputError("this backbone has no bias vectors for bitfit to train")
    for parameter in biases:
        parameter.requires_grad_(True)
    return Baseline(setting.backbone.model, lambda: setting.share(0))


class Bottleneck(nn.Module):
    """y + up(relu(down(y))) behind a linear layer with output y; at first, y."""

    def __init__(self, linear: LinearLayer, width: int) -> None:
        super().__init__()
        self.linear = linear
        features = len(weight_of(linear))
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        nn.init.normal_(self.down.weight, std=0.01)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes are those of the linear layer."""
        y = self.linear(x)
        return y + self.up(torch.relu(self.down(y)))


def _bottlenecks(setting: Setting, kinds: Sequence[str]) -> Baseline:
    chosen = {p: m for p, m in setting.linear.items() if LayerSpec(p, 0, 0).kind in kinds}
    if not chosen:
        raise InputError(f"this backbone has no {' or '.join(kinds)} to put a bottleneck behind")
    features = sum(2 * len(weight_of(layer)) for layer in chosen.values())
    width = max(1, round(setting.lora_parameters / features))
    for path, linear in chosen.items():
        setting.backbone.model.set_submodule(path, Bottleneck(linear, width))
    return Baseline(setting.backbone.model, lambda: setting.share(width * features))


def _houlsby(setting: Setting) -> Baseline:
    return _bottlenecks(setting, ("attention.output.dense", "output.dense"))


def _pfeiffer(setting: Setting) -> Baseline:
    return _bottlenecks(setting, ("output.dense",))


def _peft(setting: Setting, config: LoraConfig) -> PeftModel:
    model = setting.backbone.model
    config.target_modules = [spec.path for spec in setting.specs]
    config.lora_alpha = setting.alpha  # type: ignore[assignment]
    trained = [p for p in model.parameters() if p.requires_grad]  # which PEFT freezes
    wrapped = get_peft_model(model, config)
    for parameter in trained:
        parameter.requires_grad_(True)
    return wrapped


def _lora(setting: Setting) -> Baseline:
    network = _peft(setting, LoraConfig(r=setting.rank))
    ranks = [setting.rank] * len(setting.specs)
    return Baseline(network, lambda: setting.share(setting.lora_parameters), lambda: ranks)


def _pruning(setting: Setting) -> AdaLoRASettings:
    before, after = (round(share * setting.steps) for share in ADALORA_SCHEDULE)
    interval = max(1, (setting.steps - after - before) // PRUNINGS)
    initial = round(ADALORA_INITIAL * setting.rank)
    return AdaLoRASettings(initial, setting.rank, before, after, interval, ORTHOGONALITY)


def _adalora(setting: Setting) -> Baseline:
    pruning = setting.pruning or _pruning(setting)
    if setting.steps - pruning.after <= pruning.before + 1:
        raise InputError(f"AdaLoRA cannot prune within {setting.steps} steps: give more --epochs")
    initial = pruning.initial_rank
    network = _peft(
        setting,
        AdaLoraConfig(
            init_r=initial, target_r=pruning.target_rank, total_step=setting.steps,
            tinit=pruning.before, tfinal=pruning.after, deltaT=pruning.interval,
        ),
    )  # fmt: skip
    named = dict(network.named_parameters())
    matrices = [p for name, p in named.items() if ".lora_A." in name or ".lora_B." in name]
    scales = [named[f"base_model.model.{spec.path}.lora_E.default"] for spec in setting.specs]
    identity = torch.eye(initial, device=matrices[0].device)

    def penalty() -> Tensor:  # PEFT adds it to its own loss only
        grams = torch.stack([p @ p.T if len(p) == initial else p.T @ p for p in matrices])
        return pruning.orthogonality * torch.linalg.matrix_norm(grams - identity).mean()

    def ranks() -> list[int]:
        return [int((scale != 0).sum()) for scale in scales]

    def share() -> float:
        sizes = (spec.in_features + 1 + spec.out_features for spec in setting.specs)
        return setting.share(sum(r * n for r, n in zip(ranks(), sizes, strict=True)))

    adalora = cast(AdaLoraModel, network.base_model)
    return Baseline(network, share, ranks, penalty=penalty, after_step=adalora.update_and_allocate)


class UniformBits(nn.Module):
    """Adapters of full rank as Bayesian LoRA has them, with one bit width for all tensors."""

    bit_gate: Tensor

    def __init__(self, network: AdaptedNetwork, bits: int) -> None:
        super().__init__()
        self.network = network
        self.weights = nn.Parameter(network.initial_adapter_weights())
        self.register_buffer("bit_gate", uniform_bits(network, bits))
        self.quantized = False

    def gradient_checkpointing_enable(self, settings: object) -> None:
        """As of a transformers model; the settings are the network's own."""
        self.network.gradient_checkpointing_enable()

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        """Logits, shape (batch, classes)."""
        gate = self.bit_gate if self.quantized else None
        return SimpleNamespace(logits=self.network(batch, Latents(self.weights, None, gate)))


def _uniform(setting: Setting, bits: int) -> Baseline:
    network = AdaptedNetwork(
        setting.backbone.model, rank=setting.rank, alpha=setting.alpha,
        target_modules=setting.target_modules, quantized_tensors=setting.quantized_tensors,
        trained_parameters=setting.backbone.new_parameters,
    )  # fmt: skip
    module = UniformBits(network, bits)

    def after_step(step: int) -> None:
        if step + 1 in setting.calibrations:
            was_training = module.training
            module.eval()
            network.calibrate(setting.calibration(), module.weights)
            module.train(was_training)
            module.quantized = True

    share = float(relative_bops(network, None, uniform_bits(network, bits)))
    ranks = [setting.rank] * len(setting.specs)
    after_step(-1)  # if it is to begin with the first step
    widths = dict.fromkeys(setting.quantized_tensors, bits)
    return Baseline(module, lambda: share, lambda: ranks, widths, after_step=after_step)


BASELINES: dict[str, Callable[[Setting], Baseline]] = {
    "full": _full,
    "bitfit": _bitfit,
    "houlsby": _houlsby,
    "pfeiffer": _pfeiffer,
    "lora": _lora,
    "adalora": _adalora,
    "adalora_published": _adalora,
    "lora_8bit": lambda setting: _uniform(setting, 8),
    "lora_4bit": lambda setting: _uniform(setting, 4),
}
