r"""The model: adapter weights, rank gates and bit gates are drawn, the network makes a label.

    adapter_weights ~ Normal(0, scale)                                (P,)
    rank_gate       ~ HardConcrete(prior logits)                      (L, R)
    bit_gate        ~ HardConcrete(prior logits)                      (L, T, K)
    bops            : factor exp(-price * share(rank_gate, bit_gate)) if the prior couples gates
    label_n         ~ likelihood(network(x_n, latents))               n = 1 ... N, plate `data`

Source: Meo et al., "Bayesian-LoRA", arXiv 2406.13046.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from bayes_lora.distributions import HardConcrete
from bayes_lora.gates import nested, reach
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork, Batch, Latents

TEMPERATURE = 2 / 3
"""Temperature of every gate, in prior and guide; Louizos et al., arXiv 1712.01312."""


class Gates(NamedTuple):
    """Rank and bit gates of the whole network; None for gates that do not take part.

    Without rank gates every component is on; without bit gates nothing is quantized.

    Attributes
    ----------
    rank_gate : Tensor or None
        Shape (L, R), in [0, 1].
    bit_gate : Tensor or None
        Shape (L, T, K), in [0, 1].
    """

    rank_gate: Tensor | None = None
    bit_gate: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Gates:
        """Make the same change to the gates of every kind that takes part."""
        return Gates(*(None if gate is None else change(gate) for gate in self))


class BayesianLoRA(PyroModule):
    """The generative model, a Pyro program.

    Parameters
    ----------
    network : AdaptedNetwork
        The adapted transformer.
    likelihood : PyroModule
        From the network's output to the distribution of a label.
    priors : Priors
        Of adapter weights and gates.
    num_examples : int
        N, the size of the training set.
    rank_gates, bit_gates : bool
        Which kinds of gates are latent.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from bayes_lora.models.likelihoods import Classification
    >>> config = BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1,
    ...                     num_attention_heads=2, intermediate_size=16)
    >>> network = AdaptedNetwork(BertForSequenceClassification(config), rank=2)
    >>> model = BayesianLoRA(network, Classification(), Priors(), num_examples=100,
    ...                      bit_gates=False)
    >>> model({"input_ids": torch.ones(4, 7, dtype=torch.long)}).shape  # prior predictive
    torch.Size([4])
    """

    rank_prior_logits: Tensor
    bit_prior_logits: Tensor

    def __init__(
        self,
        network: AdaptedNetwork,
        likelihood: PyroModule,
        priors: Priors,
        num_examples: int,
        rank_gates: bool = True,
        bit_gates: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.likelihood = likelihood
        self.priors = priors
        self.num_examples = num_examples
        self.rank_gates, self.bit_gates = rank_gates, bit_gates
        rank_logits, bit_logits = priors.gates.logits(network, bit_gates)
        self.register_buffer("rank_prior_logits", rank_logits)
        self.register_buffer("bit_prior_logits", bit_logits)

    @property
    def gated(self) -> bool:
        """Whether any gates are latent; without, this is plain LoRA."""
        return self.rank_gates or self.bit_gates

    def gate_priors(self) -> dict[str, TorchDistribution]:
        """Prior of every latent gate site: `rank_gate` (L, R), `bit_gate` (L, T, K)."""
        priors: dict[str, TorchDistribution] = {}
        if self.rank_gates:
            gate = HardConcrete(TEMPERATURE, logits=self.rank_prior_logits)
            priors["rank_gate"] = gate.to_event(2)
        if self.bit_gates:
            gate = HardConcrete(TEMPERATURE, logits=self.bit_prior_logits)
            priors["bit_gate"] = gate.to_event(3)
        return priors

    @torch.no_grad()
    def logits_without_data(self, probabilities: Gates) -> Gates:
        """Logits that gates would have if the data said nothing of them.

        A factor of the prior couples the gates, so that one gate's logit is optimal given the
        others: prior logit + (1 / r) d E[log factor] / d p, where p is the probability of the
        gate to be open and r that of it to be reached.

        Parameters
        ----------
        probabilities : Gates
            P(open) under the guide, shapes (L, R) and (L, T, K).

        Returns
        -------
        Gates
            Logits in nats, of the same shapes, in double precision.
        """
        given = zip(probabilities, (self.network.structure, nested), strict=True)
        reached = Gates(*(None if p is None else reach(p.double(), order) for p, order in given))
        with torch.enable_grad():
            probs = probabilities.map(lambda p: p.double().requires_grad_())
            factor = self.priors.gates.log_factor(self.network, *probs)
            leaves = [p for p in probs if p is not None]
            slopes = [torch.zeros_like(p) for p in leaves]
            if factor is not None and leaves:
                slopes = list(torch.autograd.grad(factor, leaves))
        found: list[Tensor | None] = []
        for prior, r in zip((self.rank_prior_logits, self.bit_prior_logits), reached, strict=True):
            found.append(None if r is None else prior + slopes.pop(0) / r.clamp_min(1e-300))
        return Gates(*found)

    def forward(
        self,
        batch: Batch,
        labels: Tensor | None = None,
        kl_weight: float = 1.0,
        fixed: Gates | None = None,
    ) -> Tensor:
        """Draw the latents and the labels of one batch.

        Parameters
        ----------
        batch : mapping of str to Tensor
            The backbone's keyword arguments, `batch` examples.
        labels : Tensor, optional
            Observed labels, shape (batch,).
        kl_weight : float
            Weight of every prior term, annealed from 0 to 1; 1 is the ELBO.
        fixed : Gates, optional
            Hold the gates at these values: they are not sampled then.

        Returns
        -------
        Tensor
            The labels, drawn or observed, shape (batch,).
        """
        with scaled(kl_weight * self.priors.adapter_weight_temperature):
            prior = self.priors.adapter_weights(self.network)
            adapter_weights = pyro.sample("adapter_weights", prior)
        with scaled(kl_weight):
            gates = fixed
            if gates is None:
                priors = self.gate_priors()
                gates = Gates(**{name: pyro.sample(name, p) for name, p in priors.items()})
                factor = self.priors.gates.log_factor(self.network, *gates)
                if factor is not None and priors:
                    pyro.factor("bops", factor)
        output = self.network(batch, Latents(adapter_weights, *gates))
        size = len(output)
        with pyro.plate("data", max(self.num_examples, size), subsample=torch.arange(size)):
            return pyro.sample("label", self.likelihood(output), obs=labels)


def scaled(kl_weight: float) -> AbstractContextManager[Any]:
    """Weigh all log densities inside; zero masks them, as Pyro's scale must be positive."""
    return poutine.scale(scale=kl_weight) if kl_weight > 0 else poutine.mask(mask=False)
