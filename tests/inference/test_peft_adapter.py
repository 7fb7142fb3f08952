"""Runs that start from an adapter of stock PEFT."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import bayes_lora
from bayes_lora.errors import InputError
from bayes_lora.flat_weights import split_weights
from bayes_lora.inference.cli import main
from bayes_lora.inference.decide import judge
from bayes_lora.inference.peft_adapter import read_peft
from bayes_lora.inference.trained import read_run, validation
from bayes_lora.network import AdaptedNetwork, Latents


@pytest.fixture
def adapter(inputs, tmp_path):
    """Save a random LoRA adapter of the tiny model; returns its folder and the adapted model."""

    def make(**changes):
        stock = AutoModelForSequenceClassification.from_pretrained(inputs / "model")
        options = {"r": 2, "lora_alpha": 5, "target_modules": ["query", "dense"],
                   "exclude_modules": ".*pooler.*", "task_type": TaskType.SEQ_CLS}  # fmt: skip
        model = get_peft_model(stock, LoraConfig(**options | changes)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return make


def adapted(inputs, **changes):
    stock = AutoModelForSequenceClassification.from_pretrained(inputs / "model")
    return AdaptedNetwork(stock, **{"rank": 3, "alpha": 4.0} | changes).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 3}, "alpha_pattern": {"encoder.layer.1.output.dense": 9}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_network_starts_as_stock_peft_has_it(adapter, inputs, batch, changes):
    folder, model = adapter(**changes)
    network = adapted(inputs)
    initial = network.initial_adapter_weights(torch.Generator().manual_seed(1))
    weights, unknown = read_peft(folder, network, initial)
    assert unknown == ()
    batch["input_ids"] = batch["input_ids"] % 20
    with torch.no_grad():
        wanted = model(**batch).logits
        torch.testing.assert_close(network(batch, Latents(weights)), wanted, atol=2e-5, rtol=1e-5)
    parts = split_weights(weights, network.specs, network.rank)
    for spec, (A, e, B) in zip(network.specs, parts, strict=True):
        assert (e == 1).all()
        size = A.norm(dim=1) * B.norm(dim=0)  # of every component, the largest first
        assert (size.diff() <= 1e-6).all()
        if "key" in spec.path or "value" in spec.path:
            assert (B == 0).all()


def test_gpt2_starts_as_stock_peft_has_it(backbone, batch, tmp_path):
    """Its weights lie the other way round, A and B of PEFT do not; one layer is square."""
    options = {"target_modules": ["c_attn", "attn.c_proj", "c_fc"], "fan_in_fan_out": True}
    model = get_peft_model(
        backbone("gpt2"), LoraConfig(r=2, lora_alpha=5, task_type=TaskType.SEQ_CLS, **options)
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    network = AdaptedNetwork(backbone("gpt2"), rank=3, alpha=4.0).eval()
    weights, unknown = read_peft(tmp_path, network, network.initial_adapter_weights())
    assert unknown == ()
    with torch.no_grad():
        wanted = model(**batch).logits
        torch.testing.assert_close(network(batch, Latents(weights)), wanted, atol=2e-5, rtol=1e-5)


def test_a_run_starts_there_without_a_warm_up(adapter, command, read_history, tmp_path):
    folder, _ = adapter()
    code, _, err = command(
        init_adapter=folder, price=3, learning_rate=1e-9, gate_learning_rate=1e-9
    )
    assert code == 0, err
    phases = [row["phase"] for row in read_history(tmp_path / "run")]
    assert list(dict.fromkeys(phases)) == ["anneal", "joint", "settle"]
    assert read_run(tmp_path / "run").config.training.warmup_share == 0
    (folder / "adapter_config.json").unlink()  # the run no longer needs it
    assert len(read_run(tmp_path / "run").guide.loc)


def test_an_adapter_of_another_backbone_is_told(adapter, command):
    folder, _ = adapter()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "bert-base-cased"}
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"was trained on bert-base-cased, this is .*/model"):
        assert command(init_adapter=folder)[0] == 0


def test_an_adapter_without_its_head_is_warmed_up(adapter, command, read_history, tmp_path):
    folder, _ = adapter()
    file = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "classifier" not in k}, file)
    with pytest.warns(UserWarning, match="has no classifier.weight: it is learned anew"):
        code, _, err = command(init_adapter=folder, price=3, epochs=3)
    assert code == 0, err
    assert read_history(tmp_path / "run")[0]["phase"] == "warmup"


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"r": 4}, {}, "give --rank 4"),
        ({}, {"target_modules": ".*query"}, "--target_modules leaves it out"),
        (
            {"target_modules": "all-linear", "exclude_modules": None},
            {},
            "adapts bert.pooler.dense: .* outside the repeated",
        ),
        ({"use_dora": True}, {}, "has use_dora"),
        ({"bias": "all"}, {}, "trained biases"),
        ({"init_lora_weights": "olora"}, {}, "changes the backbone's weights"),
    ],
)
def test_what_cannot_be_a_start_is_refused(adapter, inputs, options, changes, said):
    folder, _ = adapter(**options)
    network = adapted(inputs, **changes)
    with pytest.raises(InputError, match=said):
        read_peft(folder, network, network.initial_adapter_weights())


@pytest.mark.parametrize(
    "damage", ["missing", "type", "head", "backbone", "B", "list", "alpha", "NaN", "rank", "vector"]
)
def test_a_folder_that_is_no_fitting_adapter(adapter, inputs, backbone, damage):
    folder, _ = adapter()
    network = adapted(inputs)
    file, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    content = json.loads(file.read_text())
    if damage == "missing":
        tensors.unlink()
    elif damage == "type":
        file.write_text(json.dumps(content | {"peft_type": "IA3"}))
    elif damage == "list":
        file.write_text("[]")
    elif damage == "alpha":
        file.write_text(json.dumps(content | {"lora_alpha": None}))
    elif damage == "NaN":
        file.write_text(json.dumps(content | {"lora_alpha": float("nan")}))
    elif damage in ("rank", "vector"):
        kept = load_file(tensors)
        name = next(name for name in kept if name.endswith("lora_B.weight"))
        kept[name] = torch.zeros(16, 3) if damage == "rank" else torch.zeros(16)
        save_file(kept, tensors)
    elif damage == "B":
        kept = load_file(tensors)
        del kept[next(name for name in kept if name.endswith("lora_B.weight"))]
        save_file(kept, tensors)
    elif damage == "head":
        network.backbone.classifier = torch.nn.Linear(16, 1)  # would broadcast
    else:
        network = AdaptedNetwork(backbone(intermediate_size=40), rank=3)
    said = {
        "missing": "no adapter",
        "type": "IA3",
        "head": "does not fit",
        "backbone": "another size",
        "B": "has no .*lora_B",
        "list": "is empty",
        "alpha": "has no alpha",
        "NaN": "has no alpha",
        "rank": "no rank in common",
        "vector": "no rank in common",
    }
    with pytest.raises(InputError, match=said[damage]):
        read_peft(folder, network, network.initial_adapter_weights())


def test_an_encoder_that_was_trained_with_the_adapter_is_kept(adapter, command, tmp_path, capsys):
    """The pooler came with the adapter; it is not the pretrained one."""
    folder, model = adapter(modules_to_save=["classifier", "pooler"])
    code, _, err = command(init_adapter=folder, price=3)
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    found = read_run(tmp_path / "run")
    judged = judge(found, found.gates, validation(found))
    assert judged["nll"] == pytest.approx(metrics["nll"], abs=1e-6)
    name = "base_model.model.bert.pooler.modules_to_save.default.dense.weight"
    theirs = dict(model.named_parameters())[name]
    ours = found.model.network.backbone.bert.pooler.dense.weight
    assert (ours - theirs).abs().max() < 0.05  # where it started, give or take the training
    assert (
        main(["export", str(tmp_path / "run"), "--format", "peft", "--to", str(tmp_path / "p")])
        == 0
    )
    saved = json.loads((tmp_path / "p" / "adapter_config.json").read_text())["modules_to_save"]
    assert "bert.pooler.dense" in saved


def test_a_regression_starts_where_it_was_exported(command, inputs, tmp_path):
    """A head of PEFT's gives labels in their units; ours works in standard deviations of them."""
    files = {f"{split}_file": inputs / f"{split}_scores.jsonl" for split in ("train", "validation")}
    code, _, err = command(
        **files, method="lora", output_dir=tmp_path / "first", learning_rate=0.01
    )
    assert code == 0, err
    first = tmp_path / "first"
    assert main(["export", str(first), "--format", "peft", "--to", str(tmp_path / "peft")]) == 0
    code, _, err = command(
        **files, method="lora", init_adapter=tmp_path / "peft", learning_rate=1e-12, epochs=1
    )
    assert code == 0, err
    texts = ["the key is here .", "the dogs sing ."]
    wanted, found = (bayes_lora.load(f).predict(texts)["label"] for f in (first, tmp_path / "run"))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
