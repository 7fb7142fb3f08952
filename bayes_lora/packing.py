r"""Values on a grid of b bits, stored in b bits each.

A value of `quantization.quantize` is c s with an integer code c in -n ... n, n = 2^(b-1) - 1 and
s = 2 r / (2^b - 1). Codes are stored as c + n, an unsigned number of b bits: of 2 and 4 bits four
and two in a byte, the first in its lowest bits; of 16 bits two bytes, the lower one first.
Unpacking multiplies in the quantizer's own arithmetic, so it gives its output to the last bit (but
for the sign of a zero).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_lora.quantization import largest_integer

WIDTHS = (2, 4, 8, 16)


def packed_size(count: int, bits: int) -> int:
    """Bytes that so many codes take.

    Examples
    --------
    >>> packed_size(5, 2), packed_size(5, 16)
    (2, 10)
    """
    return -(-count * bits // 8)


def pack(values: Tensor, limit: Tensor, bits: int) -> Tensor:
    """Store values that lie on a grid.

    Parameters
    ----------
    values : Tensor
        As `quantize(x, limit, bits)` gives them, float32, any shape.
    limit : Tensor
        Range of the grid, broadcastable to `values`.
    bits : int
        2, 4, 8 or 16.

    Returns
    -------
    Tensor
        uint8, shape (packed_size(values.numel(), bits),).

    Raises
    ------
    ValueError
        If a value is not on the grid.

    Examples
    --------
    >>> pack(torch.tensor([-1.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor(1.5), bits=2)
    tensor([164,   1], dtype=torch.uint8)
    """
    largest, step = largest_integer(bits), _step(limit, bits)
    codes = (values / step).round_()
    if not torch.equal(codes * step, values) or (codes.abs() > largest).any():
        raise ValueError(f"values are not on the grid of {bits} bits")
    unsigned = (codes + largest).flatten().to(torch.int32)
    if bits == 16:
        return torch.stack([unsigned & 255, unsigned >> 8], -1).flatten().to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)
    room = unsigned.new_zeros(packed_size(len(unsigned), bits) * len(shifts))
    room[: len(unsigned)] = unsigned
    return (room.view(-1, len(shifts)) << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, limit: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Read back what `pack` stored, bit for bit.

    Parameters
    ----------
    packed : Tensor
        uint8, shape (packed_size(count, bits),).
    limit, bits
        Of the grid.
    shape : tuple of int
        Of the values.

    Returns
    -------
    Tensor
        float32, of that shape.

    Examples
    --------
    >>> packed = torch.tensor([164, 1], dtype=torch.uint8)
    >>> unpack(packed, torch.tensor(1.5), bits=2, shape=(5,))
    tensor([-1.,  0.,  1.,  1.,  0.])
    """
    wide = packed.to(torch.int32)
    if bits == 16:
        unsigned = wide[0::2] | (wide[1::2] << 8)
    else:
        shifts = torch.arange(0, 8, bits, dtype=torch.int32)
        unsigned = ((wide[:, None] >> shifts) & (2**bits - 1)).flatten()
    count = torch.Size(shape).numel()
    codes = unsigned[:count].view(shape) - largest_integer(bits)
    return codes.to(torch.float32).mul_(_step(limit, bits))


def _step(limit: Tensor, bits: int) -> Tensor:
    """As in `quantize`, whose rounding must be met exactly."""
    return limit.float() * (2 / (2**bits - 1))
