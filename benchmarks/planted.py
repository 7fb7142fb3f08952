"""What `planted_rank.py` and `planted_precision.py` share: a small BERT, texts, a likelihood."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY, TOKENS = 200, 8


def small_bert(blocks: int, outputs: int, seed: int) -> BertForSequenceClassification:
    """BERT of width 32 with random weights, large enough for its attention to do something."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=blocks,
        num_attention_heads=2, intermediate_size=48, max_position_embeddings=16,
        num_labels=outputs, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return BertForSequenceClassification(config)


def random_texts(examples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Texts of random tokens, of one length."""
    ids = torch.randint(1, VOCABULARY, (examples, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class KnownNoise(PyroModule):
    """Normal likelihood of several outputs, of known standard deviation."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, output: Tensor) -> dist.Distribution:
        """Distribution of the labels (batch, outputs) given their means."""
        return dist.Normal(output, self.scale).to_event(1)
