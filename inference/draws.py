r"""Draws of discrete gates: from the guide, and from the prior.

The guide's gates are independent, open with probability sigmoid(logit). A prior with a factor,

    p(z) ~ prod Bernoulli(z; logits) * factor(z),

couples them; it is drawn from by Gibbs sampling, many chains side by side. As the log factor is
linear in every gate, the logit of one gate given all others is its own plus the derivative of the
log factor. The gates of different layers are updated together: exact where the log factor is a
sum over layers, as bit operations are.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Bernoulli
from torch.func import grad, vmap

from bayes_lora.costs import relative_bops
from bayes_lora.gates import expected_bits, nested, reach
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.network import AdaptedNetwork

SWEEPS = 10


def unbound(gates: Gates, draws: int) -> list[Gates]:
    """Draws with a first axis S, as a list of `draws` single ones."""
    return [gates.map(itemgetter(s)) for s in range(draws)]


def draw_posterior(guide: GateGuide, draws: int, generator: torch.Generator) -> Gates:
    """Draw discrete gates from the guide.

    Parameters
    ----------
    guide : GateGuide
        The posterior.
    draws : int
        S, how many.
    generator : torch.Generator
        On the processor.

    Returns
    -------
    Gates
        0 or 1, shapes (S, L, R) and (S, L, T, K).
    """
    return guide.open_probabilities().map(
        lambda p: torch.bernoulli(p.cpu().expand(draws, *p.shape), generator=generator)
    )


@torch.no_grad()
def draw_prior(model: BayesianLoRA, draws: int, generator: torch.Generator) -> Gates:
    """Draw discrete gates from the prior, by Gibbs sampling if a factor couples them.

    Parameters
    ----------
    model : BayesianLoRA
        Its gate prior is drawn from.
    draws : int
        S, how many; each is the end of a chain of its own.
    generator : torch.Generator
        On the processor.

    Returns
    -------
    Gates
        0 or 1, shapes (S, L, R) and (S, L, T, K).
    """
    used = (model.rank_gates, model.bit_gates)
    both = (model.rank_prior_logits, model.bit_prior_logits)
    logits = [a.cpu() for a, on in zip(both, used, strict=True) if on]
    state = [
        torch.bernoulli(a.sigmoid().expand(draws, *a.shape), generator=generator) for a in logits
    ]

    def gates(values: tuple[Tensor, ...]) -> Gates:
        rest = iter(values)
        return Gates(*(next(rest) if on else None for on in used))

    def log_factor(*values: Tensor) -> Tensor:
        return model.priors.gates.log_factor(model.network, *gates(values))  # type: ignore[return-value]

    if log_factor(*(z[0] for z in state)) is None:
        return gates(tuple(state))
    for _ in range(SWEEPS):
        for kind, (a, z) in enumerate(zip(logits, state, strict=True)):
            slope = vmap(grad(log_factor, argnums=kind))
            for index in torch.cartesian_prod(*(torch.arange(n) for n in a.shape[1:])).tolist():
                at = (..., *(index if isinstance(index, list) else [index]))
                logit = (a + slope(*state))[at]
                z[at] = torch.bernoulli(logit.sigmoid(), generator=generator)
    return gates(tuple(state))


@torch.no_grad()
def draw_weights(model: BayesianLoRA, guide: GateGuide, gates: Gates) -> Tensor:
    """Adapter weights at a draw of the gates: where a component is closed, from the prior."""
    drawn = guide.adapter_weights().sample()
    if guide.log_scale is None or gates.rank_gate is None:
        return drawn
    used = model.network.structure(gates.rank_gate).flatten()[guide.component.cpu()]
    prior = model.priors.adapter_weights(model.network).sample()
    return torch.where(used.to(drawn.device) > 0, drawn, prior)


def quantities(network: AdaptedNetwork, gates: Gates, draws: int) -> dict[str, NDArray[Any]]:
    """Gates, rank, bits and relative bit operations of every draw, first axis S."""
    values: dict[str, Tensor] = {}
    if gates.rank_gate is not None:
        rank = network.structure(gates.rank_gate).sum(-1)
        values |= {"rank_gate": gates.rank_gate, "rank": rank}
    if gates.bit_gate is not None:
        values |= {"bit_gate": gates.bit_gate, "bits": expected_bits(gates.bit_gate)}
    shares = [relative_bops(network, *draw) for draw in unbound(gates, draws)]
    values["relative_bops"] = torch.stack(shares)
    return {name: value.cpu().double().numpy() for name, value in values.items()}


def log_probability(gates: Gates, logits: Gates, model: BayesianLoRA) -> Tensor:
    """Log probability of the gates that are reached, if they are independent.

    Parameters
    ----------
    gates : Gates
        Draws of 0 or 1, shapes (S, L, R) and (S, L, T, K).
    logits : Gates
        Logits of guide or prior, nats, shapes (L, R) and (L, T, K).
    model : BayesianLoRA
        Which of its rank gates are reached.

    Returns
    -------
    Tensor
        Nats, shape (S,); of shape () and zero without gates.
    """
    total = torch.zeros(())
    for z, a, order in zip(gates, logits, (model.network.structure, nested), strict=True):
        if z is not None and a is not None:
            each = Bernoulli(logits=a.detach().cpu()).log_prob(z) * reach(z, order)
            total = total + each.flatten(1).sum(-1)
    return total
