"""LoRA cut down after training: the adapters' largest singular values, in all layers together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

A, B = ".lora_A.default.weight", ".lora_B.default.weight"


def singular_components(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of B A, of which only an r x r matrix is decomposed.

    Parameters
    ----------
    lora_A, lora_B : Tensor
        Shapes (r, in) and (out, r).

    Returns
    -------
    tuple of three Tensors
        Left vectors (out, r), singular values (r,), the largest first, right vectors (r, in).

    Examples
    --------
    >>> left, values, right = singular_components(2 * torch.eye(2, 3), torch.ones(4, 2))
    >>> torch.allclose(left * values @ right, torch.ones(4, 2) @ (2 * torch.eye(2, 3)), atol=1e-6)
    True
    """
    # B A = Q_b (R_b R_a') Q_a'
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(lora_A.T), torch.linalg.qr(lora_B)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ u, values, vh @ q_a.T


@torch.no_grad()
def truncate(network: nn.Module, parameters: float) -> dict[str, int]:
    """Keep the largest singular values of B A over all layers, as many as fit a size.

    Parameters
    ----------
    network : Module
        With adapters of PEFT's LoRA, all of one scale alpha / r; A and B are changed in place, a
        component that is cut off becomes zero.
    parameters : float
        Entries of A and B that may be left, over all layers.

    Returns
    -------
    dict of str to int
        Rank that is left, by the layer's path.
    """
    named = dict(network.named_parameters())
    paths = [name.removesuffix(A) for name in named if name.endswith(A)]
    factors = {p: singular_components(named[p + A], named[p + B]) for p in paths}
    components = [(float(value), path) for path, (_, s, _) in factors.items() for value in s]
    ranks = dict.fromkeys(factors, 0)
    for _, path in sorted(components, reverse=True):
        left, _, right = factors[path]
        parameters -= len(left) + right.shape[1]
        if parameters < 0:
            break
        ranks[path] += 1
    for path, (left, s, right) in factors.items():
        named[path + A].copy_(right)
        named[path + B].copy_(left * s * (torch.arange(len(s), device=s.device) < ranks[path]))
    return ranks
