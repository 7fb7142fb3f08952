"""A point mass, the guide of maximum a posteriori estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor


class PointMass(dist.Delta):
    """Delta distribution that Pyro's analytic-KL ELBO accepts with validation switched on.

    Pyro's check asks for an entropy term that is a tensor; that of its own `Delta` is the
    number zero. The divergence from any prior is minus the prior's log density at the point,
    in nats, so a `PointMass` guide gives maximum a posteriori estimates.

    Parameters
    ----------
    v : Tensor
        The point, shape `batch_shape + event_shape`.
    log_density : float or Tensor
        Log density at the point, in nats.
    event_dim : int
        How many of the last dimensions of `v` belong to one event.

    Examples
    --------
    >>> import torch
    >>> PointMass(torch.zeros(3), event_dim=1).rsample()
    tensor([0., 0., 0.])
    """

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the parts an ELBO uses; the entropy term is the log density, a tensor."""
        log_prob = self.log_prob(x, *args, **kwargs)
        return ScoreParts(log_prob, score_function=0, entropy_term=log_prob)  # type: ignore[arg-type]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return the point, detached: it is a parameter, which a draw is not."""
        return self.rsample(torch.Size(sample_shape)).detach()
