"""LoRA cut down after training: the adapters' largest singular values, in all layers together."""

from __future__ import annotations

import torch
from torch import nn

A, B = ".lora_A.default.weight", ".lora_B.default.weight"


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
    factors = {}
    for path in (name.removesuffix(A) for name in named if name.endswith(A)):
        # B A = Q_b (R_b R_a') Q_a', so that only an r x r matrix is decomposed
        (q_a, r_a), (q_b, r_b) = (
            torch.linalg.qr(named[path + A].T),
            torch.linalg.qr(named[path + B]),
        )
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        factors[path] = (q_b @ u, s, vh @ q_a.T)
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
