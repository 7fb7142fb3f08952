"""Gradients estimated from some rows: their mean and variance, and what is not estimated."""

import pytest
import torch
from torch.nn.functional import linear

from bayes_lora.layers import AdaptedLinear, LayerLatents
from bayes_lora.quantization import Mixture, quantize_mixture
from bayes_lora.row_sample import FEWEST, linear_of_mixture, number_drawn, sample_rows

ROWS, WIDTH, OUT, DRAWS = 3000, 6, 4, 400


@pytest.fixture
def rows():
    """Inputs, and gradients that come back: of very different size, some of them zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, WIDTH, generator=generator) + 0.3
    gradient = torch.randn(ROWS, OUT, generator=generator) + 0.1
    gradient *= torch.rand(ROWS, 1, generator=generator) ** 4
    gradient[::7] = 0.0
    return x, gradient


def test_the_estimate_has_the_mean_and_the_variance_that_are_stated(rows):
    x, gradient = rows
    exact = gradient.T @ x
    found = []
    for _ in range(DRAWS):
        chosen, of_rows = sample_rows(gradient)
        assert len(chosen) == number_drawn(ROWS) == ROWS // 8
        assert (gradient[chosen] != 0).any(-1).all()  # what is zero is never drawn
        found.append(of_rows.T @ x[chosen])
    stack = torch.stack(found)
    each = gradient[:, :, None] * x[:, None, :]
    p = gradient.norm(dim=-1) / gradient.norm(dim=-1).sum()
    seen = p > 0
    spread = (each[seen] ** 2 / p[seen][:, None, None]).sum(0) - exact**2
    variance = spread / number_drawn(ROWS)
    error = (variance / DRAWS).sqrt()
    assert ((stack.mean(0) - exact).abs() <= 4 * error).all()
    # of a variance estimated from so many draws of about normal values, 4 standard errors
    ratio = stack.var(0).sum() / variance.sum()
    assert float(ratio) == pytest.approx(1.0, abs=4 * (2 / DRAWS) ** 0.5)


def test_few_rows_that_count_are_all_there_is_to_draw():
    gradient = torch.zeros(ROWS, OUT)
    gradient[5], gradient[900] = 1.0, 3.0
    chosen, _ = sample_rows(gradient)
    assert set(chosen.tolist()) == {5, 900}


def test_the_linear_map_is_the_plain_one_in_value_and_in_the_gradient_of_its_input(rows):
    x, gradient = rows
    weight = torch.randn(OUT, WIDTH, requires_grad=True)
    bias = torch.randn(OUT)
    results = []
    for function in (linear, linear_of_mixture):
        mine = x.clone().requires_grad_()
        output = function(mine, weight, bias)
        (back,) = torch.autograd.grad(output, mine, gradient)
        results += [(output.detach(), back)]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


def test_of_few_rows_the_gradient_is_exact(rows):
    x, gradient = (part[:FEWEST] for part in rows)
    weight = torch.randn(OUT, WIDTH, requires_grad=True)
    found = [
        torch.autograd.grad(function(x, weight, None), weight, gradient)[0]
        for function in (linear, linear_of_mixture)
    ]
    assert torch.equal(*found)


def test_level_weights_of_an_activation_get_the_same_gradient_in_the_mean(rows):
    x, _ = rows
    upstream = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5)) + 0.2
    limits = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)

    def gradient(estimated):
        mixture = Mixture(weights, (0, 1, 2, 3))
        output = quantize_mixture(x, limits, mixture, estimated)
        return torch.autograd.grad(output, weights, upstream)[0]

    exact = gradient(False)
    found = torch.stack([gradient(True) for _ in range(DRAWS)])
    assert found.std(0).min() > 0  # it is an estimate
    assert ((found.mean(0) - exact).abs() <= 4 * found.std(0) / DRAWS**0.5).all()


@pytest.mark.parametrize("exact", [True, False])
def test_a_layer_estimates_unless_it_is_told_not_to(rows, exact):
    x, gradient = rows
    torch.manual_seed(1)
    layer = AdaptedLinear(torch.nn.Linear(WIDTH, OUT), scaling=1.0, num_levels=3)
    factors = torch.randn(2, WIDTH), torch.ones(2), torch.randn(OUT, 2)
    layer.calibrate(x, factors[0])
    weights = torch.full((4,), 0.25, requires_grad=True)
    mixtures = {name: Mixture(weights, (0, 1, 2, 3)) for name in ("weight", "input", "hidden")}
    layer.latents = LayerLatents(*factors, mixtures=mixtures, exact=exact)
    pair = [torch.autograd.grad(layer(x), weights, gradient)[0] for _ in range(2)]
    assert torch.equal(*pair) == exact


def test_what_is_not_finite_goes_on():
    gradient = torch.ones(ROWS, OUT)
    gradient[3] = float("nan")
    _, of_rows = sample_rows(gradient)
    assert of_rows.shape == (number_drawn(ROWS), OUT)
