"""Batches."""

from itertools import chain

import torch
from datasets import Dataset

from bayes_lora.inference.batches import fixed_batches

LENGTHS = [5, 2, 9, 2, 7, 3, 8, 1, 6, 4, 5]


def collate(rows):
    return {"row": torch.tensor([row["row"] for row in rows])}


def test_fixed_batches_hold_everything_and_are_the_same_in_every_pass():
    data = Dataset.from_dict(
        {"input_ids": [[0] * n for n in LENGTHS], "row": list(range(len(LENGTHS)))}
    )
    loader = fixed_batches(data, collate, batch_size=3, seed=5)
    passes = [[batch["row"].tolist() for batch in loader] for _ in range(2)]
    assert passes[0] == passes[1]
    assert len(loader) == len(passes[0]) == 4
    assert sorted(chain(*passes[0])) == list(range(len(LENGTHS)))
    lengths = [sorted(LENGTHS[row] for row in rows) for rows in passes[0]]
    assert list(chain(*sorted(lengths))) == sorted(LENGTHS)  # like to like
    assert lengths != sorted(lengths)  # but not the shortest first
    other = [batch["row"].tolist() for batch in fixed_batches(data, collate, 3, seed=6)]
    assert other != passes[0]
