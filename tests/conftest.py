"""Small networks and data that every test can make in a moment."""

import pyro
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
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
V3 = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 8,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}  # queries that share a key
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
PAIRED = {  # an encoder and a decoder, each with its own name for what `SIZE` says
    "d_model": 16, "d_kv": 8, "d_ff": 24, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_layers": 2, "decoder_layers": 2, "num_layers": 2, "num_heads": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0,
    "dropout_rate": 0.0, "init_std": 0.3, "decoder_start_token_id": 0,
}  # fmt: skip
KINDS = {
    "bert": (BertForSequenceClassification, BertConfig, {}),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, {}),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config, V3),
    "albert": (AlbertForSequenceClassification, AlbertConfig, {"embedding_size": 8}),
    "llama": (LlamaForSequenceClassification, LlamaConfig, GROUPED),
    "llama writes": (LlamaForCausalLM, LlamaConfig, GROUPED),
    "gpt2 writes": (GPT2LMHeadModel, GPT2Config, {"n_inner": 24} | NO_DROPOUT | ENDS),
    "qwen2": (Qwen2ForSequenceClassification, Qwen2Config, GROUPED),
    "gpt2": (GPT2ForSequenceClassification, GPT2Config, {"n_inner": 24} | NO_DROPOUT | ENDS),
    "bart": (BartForSequenceClassification, BartConfig, PAIRED | ENDS),
    "t5": (T5ForSequenceClassification, T5Config, PAIRED | {"eos_token_id": 2}),
    "bart writes": (BartForConditionalGeneration, BartConfig, PAIRED | ENDS),
    "t5 writes": (T5ForConditionalGeneration, T5Config, PAIRED | {"eos_token_id": 2}),
    "vit": (
        ViTForImageClassification,
        ViTConfig,
        {"image_size": 8, "patch_size": 4, "num_channels": 1},
    ),
}


@pytest.fixture
def alone():
    """Accelerate knows of no other process or precision, as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _seeded():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def backbone():
    """Make a tiny classifier: `backbone("bert", **changes)`, or another of `KINDS`."""

    def make(kind="bert", **changes):
        torch.manual_seed(7)
        model, config, own = KINDS[kind]
        return model(config(**SIZE | own | changes))

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
def images():
    """Five images of one channel and four patches."""
    return {"pixel_values": torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def inputs_of(batch, images):
    """What a backbone of this kind takes."""

    def make(kind):
        if kind == "vit":
            return images
        if kind in ("bart", "t5"):  # they classify at the one token that ends a text
            ids = torch.full_like(batch["input_ids"], 3).where(
                batch["input_ids"] == 2, batch["input_ids"]
            )
            last = batch["attention_mask"].sum(-1, keepdim=True) - 1
            return batch | {"input_ids": ids.scatter(1, last, 2)}
        return batch

    return make


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
