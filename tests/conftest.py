"""Small networks and data that every test can make in a moment."""

import pyro
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bayes_lora.network import AdaptedNetwork

SIZE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 2,
    "initializer_range": 0.3,  # so that logits are of order one
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _seeded():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def backbone():
    """Make a tiny classifier: `backbone("bert" | "roberta" | "deberta", **changes)`."""

    def make(kind="bert", **changes):
        torch.manual_seed(7)
        size = SIZE | changes
        if kind == "roberta":
            return RobertaForSequenceClassification(RobertaConfig(**size))
        if kind == "deberta":
            v3 = {
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
                "position_buckets": 8,
            }
            return DebertaV2ForSequenceClassification(DebertaV2Config(**size, **v3))
        return BertForSequenceClassification(BertConfig(**size))

    return make


@pytest.fixture
def batch():
    """Five sentences of seven tokens, two of them shorter."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[3, 5:] = 0
    mask[4, 3:] = 0
    return {
        "input_ids": torch.randint(2, 60, (5, 7), generator=generator) * mask,
        "attention_mask": mask,
    }


@pytest.fixture
def network(backbone, batch):
    """A calibrated tiny network of rank 3 whose adapters do something."""
    made = AdaptedNetwork(backbone(), rank=3, alpha=6.0)
    made.eval()
    made.calibrate([batch], adapter_weights(made))
    return made


def adapter_weights(network, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(network.num_adapter_weights, generator=generator)


@pytest.fixture(name="adapter_weights")
def _adapter_weights():
    return adapter_weights
