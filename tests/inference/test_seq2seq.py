"""seq2seq_lm from files to exports, against what transformers itself computes of the pairs."""

import csv
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import bayes_lora
from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.cli import main
from bayes_lora.inference.config import DataConfig
from bayes_lora.inference.data import load_task
from bayes_lora.inference.encoding import collator, encode_dataset
from bayes_lora.layers import AdaptedLinear
from bayes_lora.network import AdaptedNetwork

LENGTH = 8  # tokens, so that some texts are cut


@pytest.fixture
def pairs(inputs, tmp_path):
    """Files of sentences and their words the other way round; options that train on them."""
    for split in ("train", "validation"):
        rows = map(json.loads, (inputs / f"{split}.jsonl").read_text().splitlines())
        sentences = [row["sentence"] for row in rows]
        turned = [" ".join(reversed(sentence.split()[:4])) for sentence in sentences]
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("said", "back"), *zip(sentences, turned, strict=True)])
    return {
        "task": "seq2seq_lm", "text_columns": None, "label_column": "back", "max_length": LENGTH,
        "train_file": tmp_path / "train.csv", "validation_file": tmp_path / "validation.csv",
    }  # fmt: skip


@pytest.fixture
def rows(pairs):
    with pairs["validation_file"].open() as file:
        return [(row["said"], row["back"]) for row in csv.DictReader(file)]


@torch.no_grad()
def log_probability(model, tokenizer, said, back):
    """Of one pair by the loss of transformers, which makes the decoder's input itself."""
    cut = {"truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    ids, labels = tokenizer(said, **cut)["input_ids"], tokenizer(back, **cut)["input_ids"]
    return -float(model(input_ids=ids, labels=labels).loss) * labels.numel(), labels.numel()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_every_token_is_judged_as_transformers_does(
    kind, pairs, rows, pretrained, decided_run, tmp_path
):
    """Weights alone are quantized, and so the merged export computes what the run does."""
    options = pairs | {"backbone": pretrained(kind), "quantized_tensors": "weight A e B"}
    model, tokenizer, _ = load_backbone(str(tmp_path / kind), None, "seq2seq_lm")
    both = [log_probability(model, tokenizer, *row) for row in rows]
    base = -sum(p for p, _ in both) / sum(tokens for _, tokens in both)
    folder = decided_run(**options, epochs=6)
    before = json.loads((folder / "metrics.json").read_text())
    assert before["nll"] < base - 0.1  # it has learned
    assert before["perplexity"] == pytest.approx(math.exp(before["nll"]))
    assert main(["export", str(folder), "--format", "merged", "--to", str(tmp_path / "to")]) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "to").eval()
    wanted = [log_probability(model, tokenizer, *row) for row in rows]
    found = bayes_lora.load(folder).predict(rows)
    assert found["log_probability"] == pytest.approx([p for p, _ in wanted], abs=1e-3)
    assert found["tokens"].tolist() == [tokens for _, tokens in wanted]
    report = json.loads((tmp_path / "to" / "merge_report.json").read_text())
    per_token = -sum(p for p, _ in wanted) / sum(tokens for _, tokens in wanted)
    assert report["exported_nll"] == pytest.approx(per_token, abs=1e-4)
    assert report["largest_logit_change"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_exports_and_predictions_of_pairs(
    kind, pairs, rows, pretrained, decided_run, tmp_path, capsys
):
    options = pairs | {"backbone": pretrained(kind), "quantized_tensors": "A e B"}
    folder = decided_run(**options)
    assert main(["diagnose", str(folder)]) == 0
    wanted = bayes_lora.load(folder).predict(rows[:9])
    for words in (["peft"], ["packed"], ["packed", "--with_base"]):
        to = tmp_path / "-".join(words)
        assert main(["export", str(folder), "--format", *words, "--to", str(to)]) == 0
        found = bayes_lora.load(to).predict(rows[:9])
        assert found["log_probability"] == pytest.approx(wanted["log_probability"], abs=1e-3)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_2_SEQ_LM", None)
    card = (tmp_path / "peft" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "peft"))
    names = {}
    exec(code.replace('"BACKBONE"', repr(str(tmp_path / kind))), names)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "peft")
    by_stock = [log_probability(names["model"].eval(), tokenizer, *row)[0] for row in rows[:9]]
    assert wanted["log_probability"] == pytest.approx(by_stock, abs=1e-3)
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([("back", "said"), *((back, said) for said, back in rows[:9])])
    words = ["--input", str(source), "--output", str(target)]
    assert main(["predict", str(folder), *words]) == 0
    with target.open() as file:
        found = [float(row["log_probability"]) for row in csv.DictReader(file)]
    assert found == pytest.approx(wanted["log_probability"], abs=1e-4)
    capsys.readouterr()
    (tmp_path / "one.jsonl").write_text('{"said": "the nurse"}\n')
    words = ["--input", str(tmp_path / "one.jsonl"), "--output", str(tmp_path / "x.jsonl")]
    assert main(["predict", str(folder), *words]) == 2
    assert "line 1: back is missing" in capsys.readouterr().err
    with pytest.raises(InputError, match="said and back"):
        bayes_lora.load(folder).predict(["the nurse"])


@pytest.mark.parametrize("longest", [5, LENGTH])  # of what is written; what is read has LENGTH
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_padding_of_neither_side_matters(kind, longest, pairs, pretrained, monkeypatch):
    """Also not to the ranges of activations: no padding is among what they are set by."""
    given = {n: str(v) for n, v in pairs.items() if v is not None and n != "max_length"}
    task, train, _ = load_task(DataConfig(**given), seed=0)
    model, tokenizer, _ = load_backbone(str(pretrained(kind)), None, "seq2seq_lm")
    model.eval()
    examples = list(encode_dataset(train, task, tokenizer, LENGTH).select([0, 5, 9]))
    for example, length in zip(examples, (longest, 2, longest), strict=True):
        example["labels"] = example["labels"][:1] * length
    for name in ("input_ids", "attention_mask"):
        examples[2][name] = examples[2][name][:3]
    collate = collator(task, tokenizer, model)
    tokenizer.padding_side = "left"
    together, *alone = (collate(part) for part in (examples, *([e] for e in examples)))
    assert together["decoder_attention_mask"].sum(-1).tolist() == [
        len(e["labels"]) for e in examples
    ]
    labels = together.pop("labels")
    with torch.no_grad():
        logits = model(**together).logits
        for i, batch in enumerate(alone):
            number = batch.pop("labels").numel()
            assert torch.allclose(logits[i, :number], model(**batch).logits[0], atol=1e-5)
    network = AdaptedNetwork(model, rank=2)
    seen = []
    monkeypatch.setattr(AdaptedLinear, "calibrate", lambda self, rows, lora_A: seen.append(rows))
    for batches in ([together], alone):
        network.calibrate(batches, network.initial_adapter_weights())
    number = len(network.specs)
    assert (together["input_ids"].shape[1], labels.shape[1]) == (LENGTH, longest)
    for rows, real in zip(seen[:number], seen[number:], strict=True):
        assert torch.cdist(rows, real).min(1).values.max() < 1e-3


def test_what_pairs_are_is_said_wrongly(pairs, error_of, tmp_path):
    given = {n: str(v) for n, v in pairs.items() if v is not None and n != "max_length"}
    assert "has no column 'label'" in error_of(DataConfig(**given | {"label_column": "label"}))
    assert "one column besides the label" in error_of(DataConfig(**given, problem="regression"))
    columns = {"text_columns": ["said", "more"]}
    assert "one column besides the label" in error_of(DataConfig(**given | columns))
    (tmp_path / "train.csv").write_text("said,back\na,1\nb,2\n")
    assert "row 1: back is 1; give a text" in error_of(DataConfig(**given))
    assert "needs examples of your own" in error_of(DataConfig(task="seq2seq_lm"))


def test_an_encoder_alone_does_not_write(inputs):
    with pytest.raises(InputError, match="cannot load backbone"):
        load_backbone(str(inputs / "model"), None, "seq2seq_lm")


def test_a_folder_of_pairs_has_source_and_target(tmp_path):
    (tmp_path / "seq2seq_lm").mkdir()
    for split in ("train", "validation"):
        path = tmp_path / "seq2seq_lm" / f"{split}.jsonl"
        path.write_text('{"source": "a b", "target": "b a", "id": 3}\n')
    task, train, _ = load_task(DataConfig(task="seq2seq_lm", data_dir=str(tmp_path)), seed=0)
    assert task.given_columns == ("source", "target")
    assert train[0] == {"source": "a b", "target": "b a"}
    assert np.array_equal(train.column_names, ["source", "target"])


@pytest.mark.slow
def test_methods_are_compared_on_pairs(pairs, pretrained, run_compare, tmp_path):
    methods = ["full", "bitfit", "lora", "adalora", "lora_8bit", "qr"]
    words = ["--tasks", "seq2seq_lm", "--seeds", "0", "--learning_rates", "1e-3"]
    changes = pairs | {"task": None, "backbone": pretrained("bart")}
    code, _, err = run_compare(*words, "--methods", *methods, **changes)
    assert code == 0, err
    cells = pd.read_csv(tmp_path / "out" / "comparison.csv").set_index("method")
    assert set(cells.index) == set(methods)
    assert (cells["nll"] > 0).all()
