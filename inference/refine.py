"""Refinement: from the relaxed posterior of the gates to that of discrete gates, weights held.

Relaxed gates train weights and gates together: their gradients are good, and need one pass. But
gates are deployed open or closed, and where the data say little the relaxed posterior can be far
from the discrete one (total variation distance of a rank's distribution up to 0.67 on linear
models of six gates). Here the gates are drawn open or closed, and their logits move to the
optimum of that ELBO (`natural_gradient.py`). Gates never reached stay at their prior.

The derivative in a gate must not pass a quantizer on its way from the loss: there the gradient is
straight-through, and on a small transformer quantized to 4 bits throughout, differences that it
was to give were off by several nats, some with a wrong sign. So `finetune` refines only where no
activation is quantized: then weights, A, e and B are, and their gates have exact gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from math import ceil

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils.data import DataLoader

from bayes_lora.costs import relative_bops
from bayes_lora.gates import nested
from bayes_lora.inference.elbo import prior_cost
from bayes_lora.inference.natural_gradient import GateSet, ascend, divergence
from bayes_lora.inference.train import PRICE_TRAVEL
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import GibbsGates
from bayes_lora.network import Batch, Latents

DRAWS = 4
"""Draws of all gates an iteration, each seeing the next batch."""


def refine_guide(
    model: BayesianLoRA,
    guide: GateGuide,
    batches: Sequence[Batch] | DataLoader,
    passes: float,
    draws: int = DRAWS,
    on_iteration: Callable[[dict[str, float]], None] = lambda terms: None,
    after: Mapping[str, Tensor] | None = None,
    keep: Callable[[dict[str, Tensor]], None] = lambda state: None,
) -> None:
    """Refine the gate posterior of a trained guide; the posterior of its weights is held.

    Parameters
    ----------
    model, guide : BayesianLoRA, GateGuide
        A trained pair, on one device; the guide's gate logits are changed in place.
    batches : sequence or DataLoader of mapping of str to Tensor
        The whole training set, with `labels`, as the same batches in the same order every time.
    passes : float
        Over the training set: each draw of all gates sees one batch.
    draws : int
        Draws an iteration, as in `natural_gradient.ascend`.
    on_iteration : function
        Called before every update with the terms of the ELBO of discrete gates, nats:
        `log_likelihood`, `kl_adapter_weights`, `kl_rank_gate`, `kl_bit_gate`, `energy`.
    after : mapping of str to Tensor, optional
        A state that `keep` was given in a refinement that was stopped: go on after it.
    keep : function
        Called after every update with the state of the refinement, as in
        `natural_gradient.ascend`, and with `random`, that of the global generator.

    Raises
    ------
    NumericalError
        If the log likelihood or its gradient is not finite.
    KeyError, RuntimeError
        If the state is of another refinement.
    """
    was_training = model.training
    model.eval()
    network, device = model.network, guide.loc.device
    kinds = {
        "rank_gate": (guide.rank_logits, model.rank_prior_logits, network.structure),
        "bit_gate": (guide.bit_logits, model.bit_prior_logits, nested),
    }
    sets = {
        # a rank gate scales what its component adds; a bit gate can change a tensor beyond that
        name: GateSet(logits.detach().double(), prior.double(), structure, name == "bit_gate")
        for name, (logits, prior, structure) in kinds.items()
        if logits is not None
    }

    iterations = ceil(passes * len(batches) / draws)
    turns = chain.from_iterable(repeat(batches))
    if after is not None:
        for _ in range(int(after["done"]) * draws % len(batches)):
            next(turns)
        torch.set_rng_state(after["random"])  # at last, as a loader draws too

    def gates_of(values: Sequence[Tensor]) -> Gates:
        return Gates(**dict(zip(sets, (value.float() for value in values), strict=True)))

    def log_likelihood(*values: Tensor) -> Tensor:
        batch = {name: tensor.to(device) for name, tensor in next(turns).items()}
        labels = batch.pop("labels")
        weights = guide.adapter_weights().sample()
        output = network(batch, Latents(weights, *gates_of(values), every_level=True))
        return model.likelihood(output).log_prob(labels).sum()

    prior = model.priors.adapter_weights(network)

    def costs(*probs: Tensor) -> dict[str, Tensor]:
        gates = gates_of(probs)
        used = None if gates.rank_gate is None else network.structure(gates.rank_gate)
        weights = guide.adapter_weights(used)
        try:
            kl = kl_divergence(weights, prior)
        except NotImplementedError:  # as Pyro estimates it, with a draw
            draw = weights.rsample()
            kl = weights.log_prob(draw) - prior.log_prob(draw)
        terms = {"kl_adapter_weights": kl}
        factor = model.priors.gates.log_factor(network, *gates)
        return terms if factor is None else terms | {"energy": -factor}

    def log_factor(*probs: Tensor) -> Tensor:
        return -prior_cost(costs(*probs), model.priors.adapter_weight_temperature)

    @torch.no_grad()
    def store() -> None:
        for name, gates in sets.items():
            kinds[name][0].copy_(gates.logits)  # type: ignore[union-attr]

    def report(log_likelihood: float) -> None:
        store()
        probs = [gates.logits.sigmoid() for gates in sets.values()]
        terms = {name: float(cost.detach()) for name, cost in costs(*probs).items()}
        terms |= {f"kl_{name}": float(divergence(gates)[0]) for name, gates in sets.items()}
        on_iteration({"log_likelihood": log_likelihood} | terms)
        if isinstance(model.priors.gates, GibbsGates):
            share = float(relative_bops(network, *guide.decision()))
            model.priors.gates.ascend(share, min(PRICE_TRAVEL / iterations, 1.0))

    def keep_all(state: dict[str, Tensor]) -> None:
        store()
        keep(state | {"random": torch.get_rng_state()})

    ascend(
        log_likelihood, log_factor, list(sets.values()), iterations, draws, len(batches),
        on_iteration=report, after=after, keep=keep_all,
    )  # fmt: skip
    store()
    model.train(was_training)
