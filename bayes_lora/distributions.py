r"""Hard concrete gates and their closed-form Kullback-Leibler divergences.

A hard concrete variable is a stretched and clamped relaxed Bernoulli variable,

    L = logit + log u - log(1 - u),   u ~ Uniform(0, 1)
    s = sigmoid(L / temperature)
    z = clamp(s (zeta - gamma) + gamma, 0, 1),   gamma = -0.1, zeta = 1.1,

so it has atoms at exactly 0 and 1 and a density between them. With
l0 = temperature * logit(-gamma / (zeta - gamma)) and l1 = -l0,

    P(z = 0) = sigmoid(l0 - logit),  P(z = 1) = sigmoid(logit - l1),
    P(z > 1/2) = sigmoid(logit)  for every temperature.

Between two hard concrete distributions of equal temperature, logits a_q and a_p, the
divergence is the sum over the two atoms and the integral over the interior. Flipping
z -> 1 - z where needed, let d = |a_q - a_p|, h = 1 - exp(-d), u_i = sigmoid(l_i - a_q)
and w_i = 1 - u_i. The interior is

    d (u1 - u0) + 2 int_{u0}^{u1} log(1 - h (1 - u)) du
      = d (u1 - u0) - 2 [w0 psi(h w0) - w1 psi(h w1)],
    psi(y) = ((1 - y) log(1 - y) + y) / y  =  y/2 + y^2/6 + y^3/12 + ...

which is smooth through d = 0. Unlike the divergence of plain relaxed Bernoulli variables,
d coth(d/2) - 2, it stays bounded as a gate becomes certain.

A Monte Carlo estimate of this divergence has the right value but a biased pathwise gradient,
because log q - log p jumps at the atoms. So every other path is an error here: a prior without
a registered divergence, and an ELBO that differentiates sampled log densities of a guide.

Sources: Louizos, Welling, Kingma, arXiv 1712.01312 (hard concrete); Maddison, Mnih, Teh,
arXiv 1611.00712 (relaxed Bernoulli).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints, kl_divergence, register_kl
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli, RelaxedBernoulli
from torch.distributions.utils import broadcast_all, clamp_probs, probs_to_logits
from torch.nn.functional import logsigmoid

GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched interval; symmetric about 1/2, so that P(z > 1/2) = sigmoid(logit)."""

_LOGIT_AT_ONE = math.log((1.0 - GAMMA) / (ZETA - 1.0))  # logit of the s at which z reaches 1


class HardConcrete(TorchDistribution):
    r"""Relaxed Bernoulli variable, stretched and clamped to [0, 1], with atoms at both ends.

    Parameters
    ----------
    temperature : float or Tensor
        Temperature of the relaxation, > 0; 2/3 is usual. Broadcast against the parameters.
    probs : float or Tensor, optional
        P(z > 1/2), a probability.
    logits : float or Tensor, optional
        Log odds of z > 1/2, in nats. Exactly one of `probs` and `logits` is given.

    Raises
    ------
    ValueError
        If not exactly one of `probs` and `logits` is given, or a parameter is out of range.

    Notes
    -----
    `log_prob` is the density with respect to Lebesgue measure on (0, 1) plus counting measure
    on {0, 1}. Source: Louizos, Welling, Kingma, arXiv 1712.01312, equations 10 to 12.

    Examples
    --------
    >>> import torch
    >>> gate = HardConcrete(2 / 3, logits=torch.tensor([-2.0, 0.0, 3.0]))
    >>> gate.probability_closed
    tensor([0.5990, 0.1682, 0.0100])
    >>> gate.rsample((1000,)).shape
    torch.Size([1000, 3])
    """

    arg_constraints = {  # noqa: RUF012 (torch declares it as an instance attribute)
        "temperature": constraints.positive,
        "probs": constraints.unit_interval,
        "logits": constraints.real,
    }
    support = constraints.unit_interval
    has_rsample = True

    def __init__(
        self,
        temperature: float | Tensor,
        probs: float | Tensor | None = None,
        logits: float | Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("give exactly one of probs and logits")
        if logits is None:
            given = cast(Tensor, probs)
            self.temperature, self.probs = broadcast_all(_on_device(temperature, given), given)
            self.logits = probs_to_logits(self.probs, is_binary=True)
        else:
            self.temperature, self.logits = broadcast_all(_on_device(temperature, logits), logits)
            self.probs = torch.sigmoid(self.logits)
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(
        self, batch_shape: Sequence[int], _instance: HardConcrete | None = None
    ) -> HardConcrete:
        """Return the same distribution with batch shape `batch_shape`, without copying."""
        new = self._get_checked_instance(HardConcrete, _instance)
        batch_shape = torch.Size(batch_shape)
        for name in ("temperature", "probs", "logits"):
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(HardConcrete, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def logit_at_one(self) -> Tensor:
        """The logistic variable L at which z reaches 1; z reaches 0 at minus this."""
        return self.temperature * _LOGIT_AT_ONE

    @property
    def probability_closed(self) -> Tensor:
        """P(z = 0), a probability of the batch shape."""
        return torch.sigmoid(-self.logit_at_one - self.logits)

    @property
    def probability_open(self) -> Tensor:
        """P(z = 1), a probability of the batch shape."""
        return torch.sigmoid(self.logits - self.logit_at_one)

    @property
    def mean(self) -> Tensor:
        """E[z] = int_0^1 P(z > t) dt, of the batch shape; by quadrature, differentiable."""
        nodes, weights = np.polynomial.legendre.leggauss(32)
        t, w = (torch.from_numpy(x).to(self.logits) for x in ((nodes + 1) / 2, weights / 2))
        at = self.temperature[..., None] * torch.logit((t - GAMMA) / (ZETA - GAMMA))
        return (torch.sigmoid(self.logits[..., None] - at) * w).sum(-1)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw gates of shape `sample_shape + batch_shape`, differentiable in the logits.

        A gate drawn at exactly 0 or 1 has zero gradient.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        u = clamp_probs(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))
        logistic = self.logits + u.log() - (-u).log1p()
        s = torch.sigmoid(logistic / self.temperature)
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the broadcast shape of `value` and the batch shape.

        Raises
        ------
        TypeError
            When it is differentiated at a value drawn by `rsample`, as `Trace_ELBO` would do:
            that pathwise gradient is biased.
        """
        if self._validate_args:
            self._validate_sample(value)
        interior = (value > 0) & (value < 1)
        s = (torch.where(interior, value, 0.5) - GAMMA) / (ZETA - GAMMA)
        centred = self.temperature * (s.log() - (-s).log1p()) - self.logits
        # logistic density of L, times dL/dz = temperature / (s (1 - s) (zeta - gamma))
        density = (
            logsigmoid(centred)
            + logsigmoid(-centred)
            + (self.temperature / (s * (1 - s) * (ZETA - GAMMA))).log()
        )
        closed = logsigmoid(-self.logit_at_one - self.logits)
        opened = logsigmoid(self.logits - self.logit_at_one)
        log_density = torch.where(interior, density, torch.where(value <= 0, closed, opened))
        if value.requires_grad:  # here and not in `score_parts`, which `to_event` would bypass
            log_density.register_hook(_refuse_pathwise_gradient)
        return log_density


def _on_device(number: float | Tensor, like: float | Tensor) -> float | Tensor:
    """The number as a tensor, made there: to copy one to a device has the host wait."""
    if isinstance(number, Tensor) or not isinstance(like, Tensor):
        return number
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _refuse_pathwise_gradient(gradient: Tensor) -> Tensor:
    if bool((gradient != 0).any()):
        raise TypeError(
            "the pathwise gradient of a sampled hard concrete log density is biased: "
            "use TraceMeanField_ELBO, which takes the closed-form divergence"
        )
    return gradient


def _psi(y: Tensor) -> Tensor:
    """Return ((1 - y) log(1 - y) + y) / y on [0, 1], by its series where that is more exact."""
    small = y < 0.05
    series = y * (1 / 2 + y * (1 / 6 + y * (1 / 12 + y * (1 / 20 + y * (1 / 30 + y / 42)))))
    safe = torch.where(small, 0.5, y)
    rest = (1 - safe).clamp_min(torch.finfo(y.dtype).tiny)  # its log has no gradient at zero
    return torch.where(small, series, (rest * rest.log() + safe) / safe)


@register_kl(HardConcrete, HardConcrete)
def kl_hard_concrete(q: HardConcrete, p: HardConcrete) -> Tensor:
    """Closed-form divergence between hard concrete distributions of equal temperature.

    Parameters
    ----------
    q, p : HardConcrete
        Guide and prior; their batch shapes broadcast.

    Returns
    -------
    Tensor
        KL(q || p) in nats, of the broadcast batch shape. As a gate becomes certainly open
        it tends to -log P_p(z = 1), and to -log P_p(z = 0) as it becomes certainly closed.

    Raises
    ------
    ValueError
        If the temperatures differ, for there is no closed form then; looked at where `q` validates
        its arguments.
    """
    if q._validate_args and not torch.equal(*broadcast_all(q.temperature, p.temperature)):
        raise ValueError("the hard concrete KL needs equal temperatures in guide and prior")
    q_logits, p_logits = torch.broadcast_tensors(q.logits, p.logits)
    flipped = q_logits < p_logits
    a_q = torch.where(flipped, -q_logits, q_logits)
    a_p = torch.where(flipped, -p_logits, p_logits)
    l1 = q.logit_at_one
    d = a_q - a_p
    h = -torch.expm1(-d)
    # w = 1 - sigmoid(l - a_q) at the two ends of the interior
    w0, w1 = torch.sigmoid(a_q + l1), torch.sigmoid(a_q - l1)
    interior = d * (w0 - w1) - 2 * (w0 * _psi(h * w0) - w1 * _psi(h * w1))
    atom_zero = (1 - w0) * (logsigmoid(-l1 - a_q) - logsigmoid(-l1 - a_p))
    atom_one = w1 * (logsigmoid(a_q - l1) - logsigmoid(a_p - l1))
    return atom_zero + atom_one + interior


@register_kl(HardConcrete, Distribution)
def _kl_hard_concrete_other(q: HardConcrete, p: Distribution) -> Tensor:
    raise TypeError(
        f"no closed-form KL from HardConcrete to {type(p).__name__}: a sampled one would have a "
        "biased gradient; give the gate a HardConcrete prior, or register_kl one"
    )


@register_kl(LogitRelaxedBernoulli, LogitRelaxedBernoulli)
def kl_relaxed_bernoulli(q: LogitRelaxedBernoulli, p: LogitRelaxedBernoulli) -> Tensor:
    """Closed-form divergence between relaxed Bernoulli distributions of equal temperature.

    Parameters
    ----------
    q, p : LogitRelaxedBernoulli
        Guide and prior; their batch shapes broadcast.

    Returns
    -------
    Tensor
        KL(q || p) = d coth(d / 2) - 2 in nats with d the difference of the logits.

    Raises
    ------
    ValueError
        If the temperatures differ, for there is no closed form then; looked at where `q` validates
        its arguments.
    """
    q_temperature, p_temperature = broadcast_all(q.temperature, p.temperature)
    if q._validate_args and not torch.equal(q_temperature, p_temperature):
        raise ValueError("the relaxed Bernoulli KL needs equal temperatures in guide and prior")
    d = (q.logits - p.logits).abs()
    small = d < 1e-2
    safe = torch.where(small, 1.0, d)
    return torch.where(small, d**2 / 6, safe / torch.tanh(safe / 2) - 2)


@register_kl(RelaxedBernoulli, RelaxedBernoulli)
def _kl_relaxed_bernoulli(q: RelaxedBernoulli, p: RelaxedBernoulli) -> Tensor:
    return kl_divergence(q.base_dist, p.base_dist)  # the sigmoid changes nothing
