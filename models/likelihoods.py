"""Likelihoods: from the network's output to the distribution of a label.

    classification   label ~ Categorical(logits),      output (batch, classes)
    regression       label ~ Normal(center + spread output, spread noise),
                                                       output (batch, 1), noise learned
    language model   tokens ~ NextTokens(logits),      output (batch, T, vocabulary)

Arguments are not validated: an output that is not finite must reach the loss, where training
stops by name of step and term. All are modules, so that what they learn is trained, moved and
saved with the model.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_lora.next_tokens import NextTokens


class Classification(PyroModule):
    """Categorical likelihood of a class label.

    Examples
    --------
    >>> import torch
    >>> Classification()(torch.zeros(2, 3)).batch_shape
    torch.Size([2])
    """

    def forward(self, output: Tensor) -> dist.Distribution:
        """Distribution of the labels (batch,) given logits (batch, classes)."""
        return dist.Categorical(logits=output, validate_args=False)


class Regression(PyroModule):
    """Normal likelihood of a number, with a learned standard deviation.

    Parameters
    ----------
    center, spread : float
        Mean and standard deviation of the labels: the network works in units of these, so that
        a head drawn at random is a sensible start.

    Examples
    --------
    >>> import torch
    >>> Regression()(torch.zeros(2, 1)).stddev
    tensor([1., 1.], grad_fn=<ExpandBackward0>)
    """

    center: Tensor
    spread: Tensor

    def __init__(self, center: float = 0.0, spread: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("center", torch.tensor(center))
        self.register_buffer("spread", torch.tensor(spread))
        self.log_noise = nn.Parameter(torch.zeros(()))

    @classmethod
    def of(cls, labels: Tensor) -> Regression:
        """The likelihood in units of these labels, shape (N,)."""
        spread = float(labels.std(correction=0))
        return cls(float(labels.mean()), spread or 1.0)

    def forward(self, output: Tensor) -> dist.Distribution:
        """Distribution of the labels (batch,) given standardised means (batch, 1)."""
        mean = self.center + self.spread * output.squeeze(-1)
        return dist.Normal(mean, self.spread * self.log_noise.exp(), validate_args=False)


class LanguageModel(PyroModule):
    """Likelihood of whole texts under a language model; the plate counts texts.

    Parameters
    ----------
    ahead : int
        Places from the logits to their token: 1 of a causal language model, 0 of a decoder behind
        an encoder.

    Examples
    --------
    >>> import torch
    >>> LanguageModel()(torch.zeros(2, 5, 9)).event_shape
    torch.Size([5])
    """

    def __init__(self, ahead: int = 1) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, output: Tensor) -> dist.Distribution:
        """Distribution of the tokens (batch, T) given logits (batch, T, vocabulary)."""
        return NextTokens(output, self.ahead)
