r"""What opening a gate adds to the log likelihood, from its derivative in single draws.

The data set is divided into parts, and a draw of all gates sees one of them. Each part keeps the
derivative of its own log likelihood in every gate as last seen there, with the gate closed, at 1/2
and open. So after one pass the sum over the parts is one of the whole data set: what is left of
noise is that of the draws, of which there are as many as parts, and nothing of the choice of
examples, which with a batch scaled to the whole data set is off by many nats.

A part has seen a gate mostly on its more probable side. What it would have been on the other side
follows from the mean difference over the parts that have seen both,

    m_p(0) ~ m_p(1) - w d,    d = mean over p of (m_p(1) - m_p(0)),
    w = n / (n + c (1 - n / P)),

where n of P parts have seen both. w shrinks a difference that few parts tell, and is 1 where all
do, for then nothing is extrapolated.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORGOTTEN = 2  # windows after which what was not seen again is forgotten
KEPT = 16  # visits of a part that it is remembered at least
TRUSTED = 50  # c: parts out of very many whose mean difference is believed by half


class Slopes:
    """Running means of the derivative in every gate, where it was at 0, at 1/2 and at 1.

    Draws with gates at 1/2 have other means than the guide, so they only tell how much the middle
    differs from the ends: the integral is the trapezoid rule on whole draws, corrected by that.

    Parameters
    ----------
    like : Tensor
        Of the gates' shape.
    parts : int
        Parts of the data set, P.
    windows : pair of float
        Draws of a part that its means look back on, of those that are whole and of the others.
    """

    def __init__(self, like: Tensor, parts: int, windows: tuple[float, float]) -> None:
        self.parts = parts
        self.windows = [max(2.0, window) for window in windows]  # what is seen once is kept
        self.visits = torch.zeros(2, parts, dtype=torch.long)
        # whole draws or not; at 0, 1/2 or 1; part; gate
        self.sums, self.counts, self.ages = (
            like.new_zeros(2, 3, parts, *like.shape) for _ in range(3)
        )

    def add(
        self, part: int, whole: bool, gates: Tensor, gradient: Tensor, middle: Tensor,
        reached: Tensor,
    ) -> None:  # fmt: skip
        """Take in one draw of a part: gates, derivative, and which count; each of the gates' shape.

        Without `whole`, those in `middle` were at 1/2.
        """
        kind = 0 if whole else 1
        self.visits[kind, part] += 1
        rate = max(1 / int(self.visits[kind, part]), 1 / self.windows[kind])
        # beside a gate at 1/2 the others of its row are not a draw
        reached = reached * (1 - middle.amax(-1, keepdim=True))
        here = torch.stack([reached * (1 - gates), middle, reached * gates])
        self.sums[kind, :, part].lerp_(here * gradient, rate)
        self.counts[kind, :, part].lerp_(here, rate)
        self.ages[kind, :, part].add_(1).mul_(here == 0)

    def state(self) -> dict[str, Tensor]:
        """All that `add` changes, by name: the tensors themselves."""
        return {
            "visits": self.visits, "sums": self.sums, "counts": self.counts, "ages": self.ages,
        }  # fmt: skip

    def integrals(self) -> Tensor:
        """D_k by Simpson's rule, nats; where an end is not seen, from the other and the middle.

        What is seen in no part is 0. What was not seen for long no longer counts: other gates may
        have moved since.
        """
        means = self.sums / self.counts.clamp_min(1e-12)
        seen = [
            (count > 0) & (age <= max(FORGOTTEN * window, KEPT))
            for count, age, window in zip(self.counts, self.ages, self.windows, strict=True)
        ]
        whole, known, bent = _trapezoid(means[0], seen[0])
        total = _mean(whole, known) * self.parts
        beside, known, bent_beside = _trapezoid(means[1], seen[1])
        # the line through one end and the middle has its mean in the middle
        share = torch.where(bent & bent_beside, 2 / 3, (~bent & ~bent_beside).to(total))
        pairs = known & seen[1][1]
        return total + share * _shrunk(means[1, 1] - beside, pairs) * self.parts


def _trapezoid(means: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of both ends in every part, where it is known, and which gates were seen at both."""
    ends = means[::2] * seen[::2]
    both = seen[0] & seen[2]
    half = 0.5 * _shrunk(ends[1] - ends[0], both)
    one = ends.sum(0) + half * seen[0] - half * seen[2]
    return torch.where(both, 0.5 * ends.sum(0), one), seen[0] | seen[2], both.any(0)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the parts in which a value is known; 0 where it is in none."""
    return (values * where).sum(0) / where.sum(0).clamp_min(1)


def _shrunk(values: Tensor, where: Tensor) -> Tensor:
    """The same, shrunk towards 0 as long as it is not known in all parts."""
    n = where.sum(0)
    return _mean(values, where) * n / (n + TRUSTED * (1 - n / len(where))).clamp_min(1e-12)
