"""Exports of decoders, read back by what is stock: grouped queries, and GPT-2's Conv1D."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import bayes_lora
from bayes_lora.inference.cli import main
from bayes_lora.inference.trained import read_run, validation
from bayes_lora.network import Latents


@pytest.fixture
def exported(decided_run, tmp_path, backbone, inputs):
    """Export a run of a kind in a form; returns the folder, what the run computes, and of what."""

    def make(kind, tensors, form):
        tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
        model = backbone(kind, vocab_size=len(tokenizer), pad_token_id=None)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / kind)
        folder = decided_run(backbone=tmp_path / kind, max_length=30, quantized_tensors=tensors)
        to = tmp_path / "exported"
        words = ["--format", form.split()[0], *form.split()[1:], "--to", str(to)]
        assert main(["export", str(folder), *words]) == 0
        run = read_run(folder)
        batch = dict(next(iter(validation(run)[0])))
        batch.pop("labels")
        assert (batch["attention_mask"] == 0).any()
        closed = run.gates._replace(rank_gate=torch.zeros_like(run.gates.rank_gate))
        with torch.no_grad():
            found, without = (
                run.model.network(batch, Latents(run.guide.loc, *gates))
                for gates in (run.gates, closed)
            )
        assert (found - without).abs().max() > 1e-2  # the adapters do something
        return to, found, batch

    return make


def close(model, batch, wanted):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stock_peft_computes_our_logits(kind, exported, tmp_path):
    """As the card says: the backbone has no padding token of its own."""
    to, wanted, batch = exported(kind, "A e B", "peft")
    code = (to / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"BACKBONE"', repr(str(tmp_path / kind))).replace("FOLDER", str(to))
    names = {}
    exec(code, names)
    close(names["model"], batch, wanted)
    config = json.loads((to / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    assert {config["r"], *config["rank_pattern"].values()} == {1, 2, 3}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stock_transformers_computes_our_logits(kind, exported):
    to, wanted, batch = exported(kind, "weight A e B", "merged")
    model = AutoModelForSequenceClassification.from_pretrained(to)
    close(model, batch, wanted)
    assert sum(isinstance(m, Conv1D) for m in model.modules()) == (8 if kind == "gpt2" else 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["packed", "packed --with_base"])
def test_packed_is_the_network_as_decided(kind, form, exported):
    to, wanted, batch = exported(kind, "weight A e B input hidden", form)
    found = bayes_lora.load(to).decided(batch).logits
    torch.testing.assert_close(found, wanted.log_softmax(-1), atol=1e-5, rtol=0)
