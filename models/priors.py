r"""The priors: the page to edit.

One prior over the adapter weights, and one over all gates, of which there are three kinds:

    independent     z ~ HardConcrete(a) for every gate, a a number or a function of the layer
    cost-weighted   a = base - price * (d share / d z at all gates open): a gate is the less
                    probable, a priori, the more bit operations its opening adds
    Gibbs           p(z) proportional to prod HardConcrete(z; base) * exp(-price * share(z))

with share(z) the network's bit operations relative to 32 x 32 bits (`bayes_lora.costs`). The
price, in nats, is the exchange rate between evidence and energy: halving the bit operations of
the whole network is worth price / 2 nats of log likelihood. The Gibbs prior is a `pyro.factor`;
its normaliser does not depend on the guide, so the objective is an ELBO up to a constant. With
a budget in place of a price, the price is found by dual ascent.

Mind what a logit implies. Ranks and levels are reached gate by gate, so with logit 0 the prior
of the rank is 1/2, 1/4, 1/8, ... for 0, 1, 2, ... (mean 1.0 of 8), and of 2, 4, 8, 16 bits 1/2,
1/4, 1/8, 1/8: the data must speak for every component and every bit, also at price 0.

Mind the scale. A gate held open against a prior logit of -3 costs some 4 nats; hundreds of them
cost more than the whole likelihood of a small data set, and everything closes.

Sources: Meo et al., arXiv 2406.13046; van Baalen et al., arXiv 2005.07093.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from bayes_lora.costs import relative_bops
from bayes_lora.network import AdaptedNetwork, LayerSpec

NORMAL_WEIGHTS = {"adapter_weight_scale": 0.05, "adapter_weight_temperature": 1e-3}
"""What `--weight_posterior normal` puts in place of these two numbers of `Priors`. At temperature 1
the divergence of 10^5 weights outweighs the likelihood of 10^3 examples: they stay at the prior."""

LogitRule = float | Callable[[LayerSpec], float]
"""A prior logit in nats: one number, or a function of the layer."""


@dataclass
class Priors:
    """The whole prior; change a line here, or pass the argument.

    Attributes
    ----------
    adapter_weight_scale : float
        Standard deviation of the zero-mean normal prior of every adapter weight.
    adapter_weight_temperature : float
        Weight of the adapter weights' divergence from it, > 0. At 1 the objective is the ELBO;
        below 1 the posterior is a cold one (Wenzel et al. 2020, arXiv 2002.02405).
    gates : GatePrior
        Prior of all rank and bit gates.

    Examples
    --------
    >>> Priors(gates=IndependentGates(rank_logits=-1.0)).adapter_weight_scale
    1.0
    """

    adapter_weight_scale: float = 1.0  # weak: A starts within 1 / sqrt(in), e at one
    adapter_weight_temperature: float = 1.0
    gates: GatePrior = field(default_factory=lambda: GibbsGates(price=1000.0))  # 1 % = 10 nats

    def adapter_weights(self, network: AdaptedNetwork) -> TorchDistribution:
        """Prior of the flat vector, event shape (P,)."""
        scale = torch.full((), self.adapter_weight_scale, device=network.device)
        return dist.Normal(0 * scale, scale).expand([network.num_adapter_weights]).to_event(1)


class GatePrior(Protocol):
    """What the model asks of a prior over gates."""

    def logits(self, network: AdaptedNetwork, bit_gates: bool) -> tuple[Tensor, Tensor]:
        """Prior logits of `rank_gate` (L, R) and `bit_gate` (L, T, K), in nats.

        `bit_gates` tells whether bits are latent; otherwise everything has 32.
        """
        ...

    def log_factor(
        self, network: AdaptedNetwork, rank_gate: Tensor | None, bit_gate: Tensor | None
    ) -> Tensor | None:
        """Log of the factor that couples all gates, shape (), in nats; None for no coupling."""
        ...


@dataclass(kw_only=True)
class IndependentGates:
    """Every gate is hard concrete, independently.

    Attributes
    ----------
    rank_logits, bit_logits : float or function of LayerSpec
        Prior logits; 0 makes open and closed equally probable.

    Examples
    --------
    >>> shallow_first = IndependentGates(rank_logits=lambda layer: -float(".11." in layer.path))
    """

    rank_logits: LogitRule = 0.0
    bit_logits: LogitRule = 0.0

    def logits(self, network: AdaptedNetwork, bit_gates: bool) -> tuple[Tensor, Tensor]:
        """Prior logits of `rank_gate` (L, R) and `bit_gate` (L, T, K), in nats."""
        rank = _per_layer(self.rank_logits, network)[:, None]
        bits = _per_layer(self.bit_logits, network)[:, None, None]
        return rank.repeat(1, network.rank), bits.repeat(1, *network.bit_gate_shape[1:])

    def log_factor(
        self, network: AdaptedNetwork, rank_gate: Tensor | None, bit_gate: Tensor | None
    ) -> Tensor | None:
        """No coupling."""
        return None


@dataclass(kw_only=True)
class CostWeightedGates(IndependentGates):
    """Independent gates whose prior logit falls with the bit operations they add.

    Attributes
    ----------
    price : float
        Nats for the bit operations of the whole network at 32 x 32 bits, >= 0.
    """

    price: float = 1000.0

    def logits(self, network: AdaptedNetwork, bit_gates: bool) -> tuple[Tensor, Tensor]:
        """Prior logits of `rank_gate` (L, R) and `bit_gate` (L, T, K), in nats."""
        rank = torch.ones(network.rank_gate_shape, requires_grad=True)
        bits = torch.ones(network.bit_gate_shape, requires_grad=True)
        share = relative_bops(network, rank, bits if bit_gates else None)
        added = torch.autograd.grad(share, (rank, bits), materialize_grads=True)
        base = super().logits(network, bit_gates)
        return base[0] - self.price * added[0], base[1] - self.price * added[1]


@dataclass(kw_only=True)
class GibbsGates(IndependentGates):
    """Gates coupled by what they cost together.

    Attributes
    ----------
    price : float
        Nats for the bit operations of the whole network at 32 x 32 bits, >= 0.
    budget : float or None
        Share of those bit operations that the decision is to take. `bayes-lora finetune` then
        calls `ascend` after every joint step; a training loop of your own must do so too.
    """

    price: float = 1000.0
    budget: float | None = None

    def __post_init__(self) -> None:
        """Refuse a price or a budget that means nothing."""
        if self.price < 0 or (self.budget is not None and not 0 < self.budget < 1):
            raise ValueError(f"{self}: the price must be >= 0, the budget in (0, 1)")
        if self.budget is not None and self.price == 0:
            raise ValueError(f"{self}: a budget moves the price by factors; let it start above 0")

    def log_factor(
        self, network: AdaptedNetwork, rank_gate: Tensor | None, bit_gate: Tensor | None
    ) -> Tensor:
        """Minus price times the share of bit operations, shape (), in nats."""
        return -self.price * relative_bops(network, rank_gate, bit_gate)

    def ascend(self, share: float, rate: float) -> None:
        """Take one step of dual ascent, in the log of the price; nothing without a budget.

        Parameters
        ----------
        share : float
            Relative bit operations of the guide's decision.
        rate : float
            Step size; the price changes by the factor (share / budget)^rate.
        """
        if self.budget is not None:
            step = rate * math.log(share / self.budget)
            self.price *= math.exp(min(max(step, -rate), rate))


def _per_layer(rule: LogitRule, network: AdaptedNetwork) -> Tensor:
    if callable(rule):
        return torch.tensor([float(rule(spec)) for spec in network.specs])
    return torch.full((len(network.specs),), float(rule))
