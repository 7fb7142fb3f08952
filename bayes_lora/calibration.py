"""Samples of what layers get as input, for the ranges of their quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MASKS = ("decoder_attention_mask", "attention_mask")


@torch.no_grad()
def sampled_inputs(
    layers: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    run: Callable[[Mapping[str, Tensor]], Any],
    tokens_per_batch: int,
) -> list[Tensor]:
    """Record inputs of layers while a network runs, padding left out.

    Parameters
    ----------
    layers : sequence of Module
        Of the network; each takes one tensor, shape (..., in).
    batches : iterable of mapping of str to Tensor
        With the attention masks that a tokenizer makes.
    run : function
        Runs the network on a batch.
    tokens_per_batch : int
        Tokens of every batch that are kept, evenly spaced.

    Returns
    -------
    list of Tensor
        Of every layer, shape (tokens, in).

    Raises
    ------
    ValueError
        If there are no batches.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> batch = {"x": torch.arange(6.0).view(3, 2), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> sampled_inputs([layer], [batch], lambda b: layer(b["x"]), tokens_per_batch=64)
    [tensor([[0., 1.],
            [2., 3.]])]
    """
    samples: list[list[Tensor]] = [[] for _ in layers]
    no_padding: dict[int, Tensor] = {}  # by the number of tokens, of encoder and decoder

    def record(index: int, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        tokens = no_padding.get(len(rows), torch.arange(len(rows)))
        spread = torch.linspace(0, len(tokens) - 1, min(tokens_per_batch, len(tokens)))
        chosen = tokens[spread.long().to(tokens.device)]
        samples[index].append(rows[chosen.to(rows.device)].float())

    handles = [
        layer.register_forward_pre_hook(lambda _, args, i=i: record(i, args[0]))
        for i, layer in enumerate(layers)
    ]
    try:
        for batch in batches:
            masks = [batch[name].flatten().bool() for name in MASKS if name in batch]
            if len(masks) == 2 and len(masks[0]) == len(masks[1]):  # which one, none can tell
                masks = [masks[0] & masks[1]]
            no_padding = {len(mask): mask.nonzero().flatten() for mask in masks}
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not samples[0]:
        raise ValueError("no batches to calibrate the quantizers with")
    return [torch.cat(sample) for sample in samples]
