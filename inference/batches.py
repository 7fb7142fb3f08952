"""Batches: of the training set, shuffled; for predictions, of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler


def training_batches(
    train: Dataset,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    batch_size: int,
    strategy: Literal["random", "group_by_length"],
    seed: int,
) -> DataLoader:
    """Shuffle the training set into batches, in the same order for the same seed.

    Parameters
    ----------
    train : Dataset
        Tokenized.
    collate : function
        From a list of examples to a batch.
    batch_size : int
        The last batch is left out if it is smaller, so that all examples weigh the same; but not
        if it is the only one.
    strategy : {"random", "group_by_length"}
        Whether a batch holds examples of like length.
    seed : int
        Of the order.
    """
    draw = torch.Generator().manual_seed(seed)
    return DataLoader(
        train,
        batch_size=batch_size,
        sampler=(
            LengthGroupedSampler(batch_size, train, generator=draw)
            if strategy == "group_by_length"
            else RandomSampler(train, generator=draw)
        ),
        drop_last=len(train) >= batch_size,
        collate_fn=collate,
    )


def evaluation_batches(
    data: Dataset, collate: Callable[[list[Any]], dict[str, Tensor]], batch_size: int = 64
) -> DataLoader:
    """All examples, the shortest first, so that batches have little padding.

    Its `sampler` says where in `data` each one stands.
    """
    lengths = [len(tokens) for tokens in data["input_ids"]]
    order = sorted(range(len(data)), key=lengths.__getitem__)
    return DataLoader(data, batch_size=batch_size, sampler=order, collate_fn=collate)


def calibration_batches(loader: DataLoader) -> DataLoader:
    """Batches of the same data, drawn, for a file may be sorted, and the same ones every time.

    To look at them leaves the order of `loader` as it is.
    """
    return DataLoader(
        loader.dataset, loader.batch_size, shuffle=True, collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def forever(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    """Batches of pass after pass, each shuffled anew if the loader shuffles."""
    while True:
        yield from loader
