"""What holds for all shapes, types, gates, widths and temperatures, not only for chosen ones."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributions import kl_divergence

from bayes_lora.costs import bit_operations, relative_bops
from bayes_lora.distributions import HardConcrete
from bayes_lora.gates import independent, level_bits, level_weights, nested, rank_probabilities
from bayes_lora.network import AdaptedNetwork
from bayes_lora.packing import pack, packed_size, unpack
from bayes_lora.quantization import Mixture, quantize, quantize_mixture
from bayes_lora.ranges import largest_value

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")

WIDTHS = st.sampled_from([2, 4, 8, 16])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 10**6)
LOGITS = st.floats(-30, 30)
TEMPERATURES = st.floats(0.05, 3)


def normal(shape, seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.double)).to(dtype)


@given(SHAPES, SEEDS, st.floats(1e-3, 1e3), DTYPES, WIDTHS)
def test_quantize_is_idempotent_odd_and_off_by_half_a_step_at_most(shape, seed, scale, dtype, bits):
    x = normal(shape, seed, scale, dtype)
    limit = largest_value(x.double(), range(x.dim())).float()
    q = quantize(x, limit, bits)
    assert q.shape == x.shape
    assert q.dtype == dtype
    assert torch.equal(quantize(-x, limit, bits), -q)
    step = 2 * limit.item() / (2**bits - 1)
    rounding = limit.item() * max(torch.finfo(dtype).eps, torch.finfo(limit.dtype).eps)
    # the topmost grid point is half a step below the range
    assert float((q.double() - x.double()).abs().max()) <= step / 2 + 2 * rounding
    again = quantize(q, limit, bits)
    assert float((again.double() - q.double()).abs().max()) <= 2 * rounding


@given(SHAPES, SEEDS, st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_a_mixture_is_the_recursion_of_residuals(shape, seed, gates):
    """x2 + z4 (e4 + z8 (e8 + ...)), with e_b the residual of b bits on the finer grid."""
    x = normal(shape, seed, dtype=torch.double)
    limit = largest_value(x, range(x.dim()))
    bits = level_bits(len(gates))
    total = torch.zeros_like(x)
    for gate, coarse, fine in reversed(list(zip(gates, bits, bits[1:], strict=False))):
        residual = quantize(x, limit, fine) - quantize(x, limit, coarse)
        total = gate * (residual + total)
    total = total + quantize(x, limit, 2)
    weights = level_weights(torch.tensor(gates, dtype=torch.double))
    active = tuple(weights.nonzero().flatten().tolist())
    limits = limit.expand(len(bits), *limit.shape)
    found = quantize_mixture(x, limits, Mixture(weights, active))
    assert torch.allclose(found, total, atol=1e-12 * float(limit))


@given(SHAPES, SEEDS, WIDTHS, st.floats(1e-3, 1e3))
def test_packing_gives_back_every_bit(shape, seed, bits, scale):
    x = normal(shape, seed, scale)
    limit = largest_value(x, range(x.dim()))
    q = quantize(x, limit, bits)
    packed = pack(q, limit, bits)
    assert len(packed) == packed_size(x.numel(), bits)
    assert torch.equal(unpack(packed, limit, bits, tuple(q.shape)), q)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.sampled_from([nested, independent]))
def test_distributions_of_rank_sum_to_one_and_have_the_mean_of_the_gates(probs, structure):
    p = torch.tensor(probs, dtype=torch.double)
    ranks = rank_probabilities(p, structure)
    assert float(ranks.sum()) == pytest.approx(1.0)
    assert float(ranks.min()) >= 0
    mean = float(ranks @ torch.arange(len(ranks), dtype=torch.double))
    assert mean == pytest.approx(float(structure(p).sum()), abs=1e-12)


@given(LOGITS, LOGITS, TEMPERATURES)
def test_divergence_of_hard_concrete_gates(q, p, temperature):
    """Not negative, zero between equals, the same with open and closed exchanged, and smooth."""

    def kl(q, p):
        pair = (
            HardConcrete(temperature, logits=torch.tensor(x, dtype=torch.double)) for x in (q, p)
        )
        return float(kl_divergence(*pair))

    found = kl(q, p)
    assert math.isfinite(found)
    assert found >= -1e-9
    assert kl(q, q) == pytest.approx(0, abs=1e-9)
    assert found == pytest.approx(kl(-q, -p), rel=1e-6, abs=1e-9)
    logits = torch.tensor(q, dtype=torch.double, requires_grad=True)
    pair = (
        HardConcrete(temperature, logits=logits),
        HardConcrete(temperature, logits=logits * 0 + p),
    )
    (slope,) = torch.autograd.grad(kl_divergence(*pair), logits)
    h = 1e-5
    assert float(slope) == pytest.approx((kl(q + h, p) - kl(q - h, p)) / (2 * h), abs=1e-4)


@given(LOGITS, TEMPERATURES, SEEDS)
def test_draws_of_gates_are_in_the_unit_interval_and_have_a_density(logits, temperature, seed):
    torch.manual_seed(seed)
    gate = HardConcrete(temperature, logits=torch.tensor([logits, -logits]))
    z = gate.rsample((50,))
    assert ((z >= 0) & (z <= 1)).all()
    assert torch.isfinite(gate.log_prob(z)).all()


# the fixture makes a new network every time
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SEEDS, st.integers(1, 4), st.integers(1, 3))
def test_opening_a_gate_never_costs_less(backbone, seed, rank, levels):
    network = AdaptedNetwork(backbone(), rank=rank, alpha=1.0, num_levels=levels)
    generator = torch.Generator().manual_seed(seed)
    gates = [
        torch.randint(2, shape, generator=generator).float()
        for shape in (network.rank_gate_shape, network.bit_gate_shape)
    ]
    more = [torch.maximum(g, torch.randint(2, g.shape, generator=generator)) for g in gates]
    assert (bit_operations(network, *more) >= bit_operations(network, *gates)).all()
    assert 0 < float(relative_bops(network, *gates)) <= float(relative_bops(network, *more)) <= 1
