r"""The guides: a mean-field posterior over gates and adapter weights.

    rank_gate       ~ HardConcrete(rank_logits)                        (L, R)
    bit_gate        ~ HardConcrete(bit_logits)                         (L, T, K)
    adapter_weights ~ PointMass(loc)  or  Normal(loc, exp(log_scale))  (P,)

Normal weights of a component whose gate is closed are at their prior, as the data say nothing of
them: so rank has to earn the divergence of its weights (`bayes_lora.gated_normal`).

A gate is open when z > 1/2, which has posterior probability sigmoid(logit) exactly, at every
temperature. So the posterior of every rank and bit width is known in closed form.
"""

from __future__ import annotations

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_lora.distributions import HardConcrete
from bayes_lora.flat_weights import component_of_weight, initial_scales
from bayes_lora.gated_normal import GatedNormal
from bayes_lora.gates import GateStructure, nested, rank_probabilities
from bayes_lora.models.model import TEMPERATURE, BayesianLoRA, Gates, scaled
from bayes_lora.network import Batch
from bayes_lora.point_mass import PointMass

INITIAL_LOGIT = 4.0
"""Logit that every gate starts from: open with probability 0.98, and not beyond reach."""


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

    component: Tensor

    def __init__(
        self, model: BayesianLoRA, initial_weights: Tensor, normal_weights: bool = False
    ) -> None:
        super().__init__()
        self.loc = nn.Parameter(initial_weights.clone())
        network = model.network
        self._structure = network.structure
        self._priors = model.priors
        component = component_of_weight(network.specs, network.rank).to(network.device)
        self.register_buffer("component", component, persistent=False)
        self.log_scale = None
        self.rank_logits = self.bit_logits = None
        if normal_weights:
            scales = initial_scales(network.specs, network.rank).to(self.loc)
            self.log_scale = nn.Parameter(scales.log())
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
        with scaled(kl_weight * self._priors.adapter_weight_temperature):
            pyro.sample("adapter_weights", self.adapter_weights(self._used(fixed)))
        with scaled(kl_weight):
            if fixed is None and self.rank_logits is not None:
                gate = HardConcrete(TEMPERATURE, logits=self.rank_logits)
                pyro.sample("rank_gate", gate.to_event(2))
            if fixed is None and self.bit_logits is not None:
                gate = HardConcrete(TEMPERATURE, logits=self.bit_logits)
                pyro.sample("bit_gate", gate.to_event(3))

    def adapter_weights(self, used: Tensor | None = None) -> TorchDistribution:
        """Posterior of the flat vector of adapter weights, event shape (P,).

        Parameters
        ----------
        used : Tensor, optional
            Probability of every component to be used, shape (L, R); default: one.
        """
        if self.log_scale is None:
            return PointMass(self.loc, event_dim=1)
        used = torch.ones_like(self.loc) if used is None else used.flatten()[self.component]
        return GatedNormal(self.loc, self.log_scale.exp(), used)

    def _used(self, fixed: Gates | None) -> Tensor | None:
        if fixed is not None:
            gate = fixed.rank_gate
            return None if gate is None else (self._structure(gate) > 0).to(self.loc)
        if self.rank_logits is None:
            return None
        gates = HardConcrete(TEMPERATURE, logits=self.rank_logits)
        return self._structure(1 - gates.probability_closed)

    @torch.no_grad()
    def open_probabilities(self) -> Gates:
        """Posterior probability that each gate is open, exact; shapes of the gates."""
        return Gates(self.rank_logits, self.bit_logits).map(torch.sigmoid)

    @torch.no_grad()
    def decision(self, least: float = 0.5) -> Gates:
        """Posterior median of every rank and bit width, as gates of 0 and 1.

        Of nested gates a component is on if it is more probably reached than not, so that rank k
        is decided only if P(rank >= k) > 1/2; of independent ones as many are on as the median
        of their number says, the most probable first. Gates that are nearly certain decide
        alike one by one.

        Parameters
        ----------
        least : float
            Component k, or level k, is kept if P(rank >= k), or that of the level, is above this;
            at 1/2, the median.

        Returns
        -------
        Gates
            0 or 1, shapes of the gates.
        """
        rank, bits = self.open_probabilities()
        return Gates(
            None if rank is None else open_up_to_quantile(rank, self._structure, least),
            None if bits is None else open_up_to_quantile(bits, nested, least),
        )


def open_up_to_quantile(probs: Tensor, structure: GateStructure, least: float = 0.5) -> Tensor:
    """Open as many gates as are needed with more than this probability.

    Parameters
    ----------
    probs : Tensor
        P(gate is open), shape (..., R).
    structure : {nested, independent}
        Which gates are the first to open: the leading ones, or the most probable ones.
    least : float
        Gate number k opens if P(number of open gates >= k) is above this; at 1/2, their median.

    Returns
    -------
    Tensor
        Gates of 0 and 1, shape (..., R).

    Examples
    --------
    >>> from bayes_lora.gates import independent
    >>> open_up_to_quantile(torch.tensor([0.9, 0.6, 0.6]), nested)  # 0.9, 0.54, 0.32
    tensor([1., 1., 0.])
    >>> open_up_to_quantile(torch.tensor([0.9, 0.6, 0.6]), nested, least=0.8)
    tensor([1., 0., 0.])
    >>> open_up_to_quantile(torch.tensor([0.3, 0.6, 0.9]), independent)
    tensor([0., 1., 1.])
    """
    if structure is nested:
        return (nested(probs) > least).float()
    at_most = rank_probabilities(probs, structure).cumsum(-1)[..., :-1]
    needed = (at_most < 1 - least).sum(-1, keepdim=True)
    place = probs.argsort(dim=-1, descending=True).argsort(dim=-1)
    return (place < needed).float()
