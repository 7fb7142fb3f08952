"""The likelihood of a number: its units, and the noise that it learns."""

import pytest
import torch

from bayes_lora.models.likelihoods import Regression


def test_regression_learns_its_noise():
    far = Regression.of(torch.tensor([1e5, 1e5 + 30.0]))  # a network of order one will do
    assert (far(torch.tensor([[0.0]])).mean, far(torch.tensor([[2.0]])).mean) == (
        1e5 + 15,
        1e5 + 45,
    )
    assert float(far(torch.zeros(1, 1)).stddev) == 15
    likelihood = Regression()
    data = 3.0 + 0.5 * torch.randn(4000)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(200):
        loss = -likelihood(torch.full((4000, 1), 3.0)).log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = float(likelihood.log_noise.detach().exp())
    assert noise == pytest.approx(float((data - 3).square().mean().sqrt()), rel=1e-3)
