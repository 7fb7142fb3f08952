"""Exports on tiny models, read back by stock PEFT, by stock transformers, and by `load`."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bayes_lora
from bayes_lora.factors import quantize_factors
from bayes_lora.flat_weights import split_weights
from bayes_lora.inference.backbone import DEMO
from bayes_lora.inference.cli import main
from bayes_lora.inference.decide import judge
from bayes_lora.inference.trained import read_run, validation
from bayes_lora.network import Latents


def logits(run):
    """Of the gated network at the decision, for one batch of the validation set; and that batch."""
    batch = dict(next(iter(validation(run)[0])))
    batch.pop("labels")
    with torch.no_grad():
        return run.model.network(batch, Latents(run.guide.loc, *run.gates)), batch


@pytest.mark.parametrize("kind", ["bert", "deberta", "roberta"])
@pytest.mark.parametrize("tensors", [None, "A e B"])
def test_stock_peft_computes_our_logits(decided_run, tmp_path, kind, tensors):
    changes = {"method": "r"} if tensors is None else {"quantized_tensors": tensors}
    folder = decided_run(kind, **changes)
    assert main(["export", str(folder), "--format", "peft", "--to", str(tmp_path / "peft")]) == 0
    found = read_run(folder)
    wanted, batch = logits(found)
    stock = AutoModelForSequenceClassification.from_pretrained(found.config.network.backbone)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).logits, wanted, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert {*config["rank_pattern"].values(), config["r"]} == {1, 2, 3}
    assert set(config["alpha_pattern"]) == set(config["rank_pattern"])
    assert len(config["target_modules"]) == 9
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert not any(".layer.0.attention.self.query." in name for name in state)  # rank 0


@pytest.mark.parametrize("tensors", ["weight A e B", None])
def test_merged_is_a_transformers_folder(decided_run, tmp_path, inputs, tensors):
    folder = decided_run(**({"quantized_tensors": tensors} if tensors else {}))
    assert main(["export", str(folder), "--format", "merged", "--to", str(tmp_path / "m")]) == 0
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    before = judge(read_run(folder), read_run(folder).gates, validation(read_run(folder)))
    assert report["score"] == before["score"]
    found = bayes_lora.load(tmp_path / "m")
    rows = [json.loads(line) for line in inputs.joinpath("validation.jsonl").open()]
    labels = found.predict([row["sentence"] for row in rows])["label"]
    right = np.mean([label == str(row["label"]) for label, row in zip(labels, rows, strict=True)])
    assert report["exported_score"] == pytest.approx(right)
    wanted, batch = logits(read_run(folder))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        change = float((model(**batch).logits - wanted).abs().max())
    if tensors:  # no activation is quantized: nothing but rounding
        assert change < 1e-5
        assert report["largest_logit_change"] < 1e-5
    else:
        assert 1e-5 < change <= report["largest_logit_change"] + 1e-6
    assert model.config.id2label == {0: "0", 1: "1"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) > 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_backbone_in_half_precision_is_exported_in_full(
    decided_run, inputs, tmp_path, backbone, dtype, capsys
):
    """And what holds all of it needs neither the run nor the backbone."""
    half = tmp_path / "half"
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    backbone(vocab_size=len(tokenizer)).to(dtype).save_pretrained(half)
    tokenizer.save_pretrained(half)
    folder = decided_run(backbone=half, quantized_tensors="A e B")
    wanted, batch = logits(read_run(folder))
    for form, more in (("packed", ["--with_base"]), ("merged", []), ("peft", [])):
        to = tmp_path / form
        assert main(["export", str(folder), "--format", form, "--to", str(to), *more]) == 0
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "peft" / "README.md").read_text(), re.S
    )
    place = {"FOLDER": tmp_path / "peft", "BACKBONE": half}
    for word, path in place.items():
        code = code.replace(f'"{word}"', f'"{path}"')
    exec(code, names := {})
    with torch.no_grad():
        found = names["model"].eval()(**batch).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    for gone in (half, folder):
        shutil.rmtree(gone)
    for form in ("packed", "merged"):
        again = bayes_lora.load(tmp_path / form)
        with torch.no_grad():
            found = again.decided(batch).logits
        torch.testing.assert_close(found, wanted.log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["merged", "packed"])
def test_deberta_is_exported_as_decided(decided_run, tmp_path, form):
    folder = decided_run("deberta", quantized_tensors="weight A e B")
    to = tmp_path / form
    assert main(["export", str(folder), "--format", form, "--to", str(to)]) == 0
    wanted, batch = logits(read_run(folder))
    with torch.no_grad():
        found = bayes_lora.load(to).decided(batch).logits
    torch.testing.assert_close(found, wanted.log_softmax(-1), atol=1e-5, rtol=0)


def test_peft_has_the_decided_adapters_on_a_base_in_full_precision(decided_run, tmp_path):
    """Of a run that quantizes everything: logits are ours with base and activations unquantized."""
    folder = decided_run()
    assert main(["export", str(folder), "--format", "peft", "--to", str(tmp_path / "peft")]) == 0
    run = read_run(folder)
    _, batch = logits(run)
    network = run.model.network
    bits = run.gates.bit_gate
    factors = split_weights(run.guide.loc.detach(), network.specs, network.rank)
    mixtures = network._mixtures(bits, every_level=False)
    on_grids = quantize_factors(factors, mixtures, network.bits)
    weights = torch.cat([value.flatten() for factor in on_grids for value in factor])
    with torch.no_grad():
        wanted = network(batch, Latents(weights, run.gates.rank_gate))
    stock = AutoModelForSequenceClassification.from_pretrained(run.config.network.backbone)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("changes", [{}, {"max_bits": 32}, {"method": "r"}], ids=str)
def test_packed_is_the_network_as_decided(decided_run, tmp_path, with_base, changes):
    folder = decided_run(**changes)
    to = tmp_path / "packed"
    words = ["export", str(folder), "--format", "packed", "--to", str(to)]
    assert main(words + ["--with_base"] * with_base) == 0
    found = read_run(folder)
    wanted, batch = logits(found)
    again = bayes_lora.load(to)
    torch.testing.assert_close(again.decided(batch).logits, wanted - wanted.logsumexp(-1, True))


@pytest.mark.slow
@pytest.mark.parametrize("tensors", ["weight A e B", "A e B"])
def test_exports_of_a_real_network(decided_run, tmp_path, tensors):
    """MiniLM: logits of all formats, and the size of what is packed."""
    folder = decided_run(backbone=None, epochs=1, quantized_tensors=tensors, alpha=4)
    found = read_run(folder)
    wanted, batch = logits(found)
    forms = {"peft": [], "merged": [], "packed": [], "base": ["--with_base"]}
    for name, words in forms.items():
        form = "packed" if name == "base" else name
        to = str(tmp_path / name)
        assert main(["export", str(folder), "--format", form, "--to", to, *words]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == DEMO
    # a base in full precision is all that PEFT has
    exact = [name for name in forms if name != "peft" or "weight" not in tensors]
    assert len(exact) == (3 if "weight" in tensors else 4)
    for name in exact:
        with torch.no_grad():
            logit = bayes_lora.load(tmp_path / name).decided(batch).logits
        torch.testing.assert_close(logit, wanted.log_softmax(-1), atol=1e-5, rtol=0)
    for name in ("packed", "base"):
        state = load_file(tmp_path / name / "packed.safetensors")
        layers = json.loads((tmp_path / name / "bayes_lora.json").read_text())["layers"]
        entries = 32 * sum(t.numel() for n, t in state.items() if n.startswith("module."))
        for layer in layers.values():
            sizes = {
                "weight": (name == "base") * layer["in"] * layer["out"],
                "A": layer["rank"] * layer["in"],
                "e": layer["rank"],
                "B": layer["rank"] * layer["out"],
            }
            entries += sum(count * layer["bits"][tensor] for tensor, count in sizes.items())
        size = (tmp_path / name / "packed.safetensors").stat().st_size
        assert entries / 8 <= size <= 1.05 * entries / 8


def test_codes_have_the_bits_that_were_decided(decided_run, tmp_path):
    folder = decided_run()
    for words in ([], ["--with_base"]):
        to = tmp_path / f"packed{len(words)}"
        assert main(["export", str(folder), "--format", "packed", "--to", str(to), *words]) == 0
        layers = json.loads((to / "bayes_lora.json").read_text())["layers"]
        size = 0
        for layer in layers.values():
            entries = {
                "weight": len(words) * layer["in"] * layer["out"],
                "A": layer["rank"] * layer["in"],
                "e": layer["rank"],
                "B": layer["rank"] * layer["out"],
            }
            size += sum(-(-n * layer["bits"][t] // 8) for t, n in entries.items())
        assert len(load_file(to / "packed.safetensors")["codes"]) == size


def test_the_card_has_ranks_bits_and_metrics(decided_run, tmp_path):
    folder = decided_run()
    assert main(["export", str(folder), "--format", "packed", "--to", str(tmp_path / "p")]) == 0
    card = (tmp_path / "p" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: bayes-lora")
    run_ = read_run(folder)
    score = judge(run_, run_.gates, validation(run_))["score"]
    assert f"| score | {score:.4g} | {score:.4g} |" in card
    assert "| 0.attention.self.query | 0 |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "onnx", "--to", "{}/x"], "invalid choice"),
        (["--format", "merged", "--with_base", "--to", "{}/x"], "goes with --format packed"),
        (["--format", "merged", "--to", "{}/x"], "is not the folder of a finished run"),
    ],
)
def test_wrong_input_is_one_line(words, said, tmp_path, capsys):
    given = [word.format(tmp_path) for word in words]
    assert main(["export", str(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_that_is_there_is_left_alone(decided_run, tmp_path, capsys):
    folder = decided_run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    assert main(["export", str(folder), "--format", "packed", "--to", str(tmp_path / "mine")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_stock_peft_loads_more_classes_as_the_card_says(decided_run, inputs, tmp_path, monkeypatch):
    """Its Python is run as it is, in the folder of the export."""
    rows = [json.loads(line) for line in (inputs / "train.jsonl").open()]
    for index, row in enumerate(rows):
        row["label"] = ("no", "so so", "yes")[index % 3]
    file = tmp_path / "three.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = decided_run(train_file=file, validation_file=file, method="r")
    assert main(["export", str(folder), "--format", "peft", "--to", str(tmp_path / "FOLDER")]) == 0
    card = (tmp_path / "FOLDER" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace('"BACKBONE"', repr(str(inputs / "model"))), names)
    found = read_run(folder)
    wanted, batch = logits(found)
    with torch.no_grad():
        out = names["model"].eval()(**batch).logits
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
    assert names["model"].config.id2label == {0: "no", 1: "so so", 2: "yes"}
    score = json.loads((tmp_path / "FOLDER" / "bayes_lora.json").read_text())
    assert score["task"]["label_names"] == ["no", "so so", "yes"]


def test_it_needs_no_data_and_leaves_other_folders_alone(decided_run, inputs, tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes((inputs / "validation.jsonl").read_bytes())
    folder = decided_run(validation_file=mine)
    mine.unlink()
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial" / "notes").write_text("keep")
    assert main(["export", str(folder), "--format", "merged", "--to", str(tmp_path / "p")]) == 0
    assert "nothing is measured" in capsys.readouterr().err
    assert "| score |" not in (tmp_path / "p" / "README.md").read_text()
    assert (tmp_path / "p.partial" / "notes").read_text() == "keep"
    assert not list(tmp_path.glob(".p-*"))
