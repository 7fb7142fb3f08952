"""Likelihoods: from the network's output to the distribution of a label.

    classification   label ~ Categorical(logits),      output (batch, classes)
    regression       label ~ Normal(output, noise),    output (batch, 1), noise learned

Arguments are not validated: an output that is not finite must reach the loss, where training
stops by name of step and term. Both are modules, so that what they learn is trained, moved and
saved with the model.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn


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

    Examples
    --------
    >>> import torch
    >>> Regression()(torch.zeros(2, 1)).stddev
    tensor([1., 1.], grad_fn=<ExpandBackward0>)
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, output: Tensor) -> dist.Distribution:
        """Distribution of the labels (batch,) given means (batch, 1)."""
        return dist.Normal(output.squeeze(-1), self.log_noise.exp(), validate_args=False)
