"""Packed codes: their bytes by hand, their size, and values that come back to the last bit."""

import pytest
import torch

from bayes_lora.packing import pack, packed_size, unpack
from bayes_lora.quantization import quantize
from bayes_lora.ranges import searched_limits


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 33), (0, 4)])
def test_what_is_packed_comes_back_to_the_last_bit(bits, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3
    limit = torch.linspace(0.7, 2.9, shape[0]).view(-1, *[1] * (len(shape) - 1))
    values = quantize(x, limit, bits)
    packed = pack(values, limit, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(x.numel(), bits) == -(-x.numel() * bits // 8)
    assert torch.equal(unpack(packed, limit, bits, shape), values)


def test_the_bytes_are_as_the_module_says():
    # 4 bits: codes -7 ... 7 are stored as 0 ... 14, the first of two in the lower half
    values = torch.tensor([-7.0, 3.0, 7.0])
    assert pack(values, torch.tensor(7.5), 4).tolist() == [0 + 16 * 10, 14]
    # 16 bits: the lower byte first; code 1 is stored as 32768
    one = torch.tensor([1.0])
    assert pack(one, torch.tensor((2**16 - 1) / 2), 16).tolist() == [0, 128]


def test_a_weight_with_a_range_for_every_row():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    limits = searched_limits(weight, (1,), (2, 4, 8, 16))
    for level, bits in enumerate((2, 4, 8, 16)):
        values = quantize(weight, limits[level], bits)
        assert torch.equal(
            unpack(pack(values, limits[level], bits), limits[level], bits, (6, 40)), values
        )


def test_values_off_the_grid_are_refused():
    with pytest.raises(ValueError, match="not on the grid of 4 bits"):
        pack(torch.tensor([0.3]), torch.tensor(7.5), 4)
    with pytest.raises(ValueError, match="not on the grid of 4 bits"):
        pack(torch.tensor([8.0]), torch.tensor(7.5), 4)
