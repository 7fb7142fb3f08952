r"""The guides: a mean-field posterior over gates and adapter weights.

    rank_gate       ~ HardConcrete(rank_logits)                        (L, R)
    bit_gate        ~ HardConcrete(bit_logits)                         (L, T, K)
    adapter_weights ~ PointMass(loc)  or  Normal(loc, exp(log_scale))  (P,)

A gate is open when z > 1/2, which has posterior probability sigmoid(logit) exactly, at every
temperature. So the posterior of every rank and bit width is known in closed form.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_lora.distributions import HardConcrete
from bayes_lora.gates import nested
from bayes_lora.models.model import TEMPERATURE, BayesianLoRA, Gates, scaled
from bayes_lora.network import Batch
from bayes_lora.point_mass import PointMass

INITIAL_LOGIT = 4.0
"""Logit that every gate starts from: open with probability 0.98, and not beyond reach."""

INITIAL_SCALE = 1e-3
"""Standard deviation that the adapter weights' posterior starts from, if it is normal."""


class GateGuide(PyroModule):
    """Mean-field guide of a `BayesianLoRA` model.

    Parameters
    ----------
    model : BayesianLoRA
        Tells which sites there are, and their shapes.
    initial_weights : Tensor
        Where the adapter weights start, shape (P,).
    normal_weights : bool
        A normal posterior of the adapter weights; otherwise a point mass (MAP).

    Attributes
    ----------
    loc : Parameter
        Location of the adapter weights, shape (P,).
    log_scale : Parameter or None
        Log standard deviation of the adapter weights, shape (P,).
    rank_logits, bit_logits : Parameter or None
        Posterior logits, nats, shapes (L, R) and (L, T, K).
    """

    def __init__(
        self, model: BayesianLoRA, initial_weights: Tensor, normal_weights: bool = False
    ) -> None:
        super().__init__()
        self.loc = nn.Parameter(initial_weights.clone())
        self._structure = model.network.structure
        self.log_scale = None
        self.rank_logits = self.bit_logits = None
        if normal_weights:
            self.log_scale = nn.Parameter(torch.full_like(self.loc, INITIAL_SCALE).log())
        if model.rank_gates:
            self.rank_logits = nn.Parameter(torch.full_like(model.rank_prior_logits, INITIAL_LOGIT))
        if model.bit_gates:
            self.bit_logits = nn.Parameter(torch.full_like(model.bit_prior_logits, INITIAL_LOGIT))

    def forward(
        self,
        batch: Batch | None = None,
        labels: Tensor | None = None,
        kl_weight: float = 1.0,
        fixed: Gates | None = None,
    ) -> None:
        """Draw every latent; the arguments are those of the model."""
        with scaled(kl_weight):
            pyro.sample("adapter_weights", self.adapter_weights())
            if fixed is None and self.rank_logits is not None:
                gate = HardConcrete(TEMPERATURE, logits=self.rank_logits)
                pyro.sample("rank_gate", gate.to_event(2))
            if fixed is None and self.bit_logits is not None:
                gate = HardConcrete(TEMPERATURE, logits=self.bit_logits)
                pyro.sample("bit_gate", gate.to_event(3))

    def adapter_weights(self) -> TorchDistribution:
        """Posterior of the flat vector of adapter weights, event shape (P,)."""
        if self.log_scale is None:
            return PointMass(self.loc, event_dim=1)
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)

    @torch.no_grad()
    def open_probabilities(self) -> Gates:
        """Posterior probability that each gate is open, exact; shapes of the gates."""
        logits = (self.rank_logits, self.bit_logits)
        return Gates(*(None if a is None else a.sigmoid() for a in logits))

    @torch.no_grad()
    def decision(self) -> Gates:
        """Posterior median of every rank and bit width, as gates of 0 and 1.

        A component, or a level, is on if it is more probably on than off. For gates that lead
        from one to the next that is the product of their open probabilities, so that a rank is
        kept only if P(rank at least this) > 1/2; gates that are nearly certain decide alike
        one by one.

        Returns
        -------
        Gates
            0 or 1, shapes of the gates.
        """
        rank, bits = self.open_probabilities()
        return Gates(
            None if rank is None else (self._structure(rank) > 0.5).float(),
            None if bits is None else (nested(bits) > 0.5).float(),
        )
