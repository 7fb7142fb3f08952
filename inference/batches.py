"""Batches: of the training set, shuffled; for predictions, of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Literal

import torch
from accelerate import skip_first_batches
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from bayes_lora.inference.images import PATHS


def lengths_of(data: Dataset) -> list[int]:
    """Tokens of every example; images are all of one size, as of one token.

    Examples
    --------
    >>> lengths_of(Dataset.from_dict({"input_ids": [[5, 6], [7]]}))
    [2, 1]
    """
    if PATHS in getattr(data, "column_names", ()):
        return [1] * len(data)
    return [len(tokens) for tokens in data["input_ids"]]


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
        Encoded.
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
    lengths = lengths_of(data)
    order = sorted(range(len(data)), key=lengths.__getitem__)
    return DataLoader(data, batch_size=batch_size, sampler=order, collate_fn=collate)


def fixed_batches(
    data: Dataset, collate: Callable[[list[Any]], dict[str, Tensor]], batch_size: int, seed: int
) -> DataLoader:
    """All examples, those of like length together, as the same batches in the same drawn order."""
    lengths = torch.tensor(lengths_of(data))
    draw = torch.Generator().manual_seed(seed)
    rows = lengths.argsort(stable=True).split(batch_size)
    order = torch.randperm(len(rows), generator=draw).tolist()
    return DataLoader(data, batch_sampler=[rows[i].tolist() for i in order], collate_fn=collate)


def calibration_batches(loader: DataLoader) -> DataLoader:
    """Batches of the same data, drawn, for a file may be sorted, and the same ones every time.

    To look at them leaves the order of `loader` as it is.
    """
    return DataLoader(
        loader.dataset, loader.batch_size, shuffle=True, collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


class EndlessBatches(Iterator[dict[str, Tensor]]):
    """Batches of pass after pass, from a place that can be kept and gone back to.

    Parameters
    ----------
    loader : DataLoader
        Shuffled anew in every pass, if it shuffles.
    order : Generator, optional
        What the loader's sampler draws the order with.
    """

    def __init__(self, loader: DataLoader, order: torch.Generator | None = None) -> None:
        self._loader, self._order = loader, order
        self._pass: Iterator[dict[str, Tensor]] = iter(())
        self._begun = None if order is None else order.get_state()
        self._taken = 0

    def __next__(self) -> dict[str, Tensor]:
        """The next batch; after the last one of a pass, the first one of the next."""
        batch = next(self._pass, None)
        while batch is None:
            self._begun = None if self._order is None else self._order.get_state()
            self._pass, self._taken = iter(self._loader), 0
            batch = next(self._pass, None)
        self._taken += 1
        return batch

    @property
    def place(self) -> tuple[Tensor, int]:
        """State of the order's generator when this pass began, and how many batches are taken."""
        if self._begun is None:
            raise ValueError("batches without a generator of their order have no place")
        return self._begun, self._taken

    def go_to(self, begun: Tensor, taken: int) -> None:
        """Go to a place that was kept; the global random state is not what it was then."""
        if self._order is None:
            raise ValueError("batches without a generator of their order have no place")
        self._order.set_state(begun)
        rest = iter(skip_first_batches(self._loader, taken))
        first = next(rest, None)  # now, as this draws random numbers
        self._pass = iter(()) if first is None else chain([first], rest)
        self._begun, self._taken = begun, taken
