r"""The label of a language model: every token of a text, given those before it.

    log p(text) = sum_t log softmax(logits_{t - a})[token_t],    without ignored tokens

A causal language model reads the text itself, and its logits are of the next token: a = 1, and the
first token has none. A decoder behind an encoder reads the text moved by one: a = 0. So a text is
one event, and what is counted in a plate is texts. A label that is `IGNORED` adds nothing, as those
of padding and of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

IGNORED = -100
"""Label of a token that is not predicted; what transformers and torch have."""


class NextTokens(TorchDistribution):
    """Distribution of the tokens of a text, each given those before it in the input.

    Parameters
    ----------
    logits : Tensor
        Of a token at every place, shape (batch, T, vocabulary).
    ahead : int
        Places from the logits to their token: 1 or 0.

    Examples
    --------
    >>> import torch
    >>> two = NextTokens(torch.zeros(1, 3, 4))
    >>> two.log_prob(torch.tensor([[3, 0, 2]])).exp()  # a quarter for each but the first
    tensor([0.0625])
    >>> two.log_prob(torch.tensor([[3, 0, IGNORED]])).exp()
    tensor([0.2500])
    """

    arg_constraints = {}  # noqa: RUF012 (as all of torch's)
    support = constraints.independent(
        constraints.integer_interval(IGNORED, torch.iinfo(torch.long).max), 1
    )

    def __init__(self, logits: Tensor, ahead: int = 1) -> None:
        self.logits, self.ahead = logits, ahead
        super().__init__(logits.shape[:1], logits.shape[1:2], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of texts (batch, T), nats: shape (batch,)."""
        logits, tokens = self._logits.flatten(0, 1), value[:, self.ahead :].flatten()
        nll = cross_entropy(logits, tokens, ignore_index=IGNORED, reduction="none")
        return -nll.view(len(value), -1).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw every token given the input before it; one that has none is ignored."""
        shape = torch.Size(sample_shape)
        drawn = torch.distributions.Categorical(logits=self._logits).sample(shape)
        first = torch.full((*shape, len(self.logits), self.ahead), IGNORED, device=drawn.device)
        return torch.cat([first, drawn], -1)

    @property
    def _logits(self) -> Tensor:
        """Those whose token is in the text."""
        return self.logits[:, : self.logits.shape[1] - self.ahead]
