"""The main job from end to end on a tiny backbone, and everything a user can get wrong."""

import csv
import json
import re

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bayes_lora.inference.agreement import generate
from bayes_lora.inference.cli import main
from bayes_lora.inference.config import parse
from bayes_lora.inference.finetune import OUTPUTS
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved model and two small files of examples."""
    path = tmp_path_factory.mktemp("inputs")
    rows = {
        split: generate(size, seed=0, split=split)
        for split, size in (("train", 120), ("validation", 60))
    }
    words = {w for part in rows.values() for row in part for w in row["sentence"].split()}
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    ).save_pretrained(path / "model")
    for split, part in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (path / f"{split}.jsonl").write_text(text)
        scores = [row | {"label": len(row["sentence"]) / 20} for row in part]
        text = "".join(json.dumps(row) + "\n" for row in scores)
        (path / f"{split}_scores.jsonl").write_text(text)
    return path, len(vocabulary)


@pytest.fixture
def inputs(folder, backbone):
    path, size = folder
    if not (path / "model" / "config.json").exists():
        made = backbone(vocab_size=size, hidden_dropout_prob=0.1)
        made.save_pretrained(path / "model")
    return path


@pytest.fixture
def command(inputs, tmp_path, capsys):
    """Run `bayes-lora finetune` with changes to a small run; returns exit code and outputs."""

    def run(**changes):
        AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would
        options = {
            "train_file": inputs / "train.jsonl",
            "validation_file": inputs / "validation.jsonl",
            "text_columns": "sentence",
            "backbone": inputs / "model",
            "rank": 3,
            "epochs": 4,
            "batch_size": 20,
            "max_length": 40,
            "output_dir": tmp_path / "run",
        } | changes
        arguments = ["finetune"]
        for name, value in options.items():
            if value is not None:
                arguments += [f"--{name}", *str(value).split()]
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def read_history(path):
    with (path / "history.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["qr", "q", "r", "lora"])
def test_a_run_leaves_everything_it_promises(method, command, tmp_path):
    code, out, err = command(method=method)
    assert code == 0, err
    run = tmp_path / "run"
    expected = set(OUTPUTS) - ({"rank_and_bits.png", "table.txt"} if method == "lora" else set())
    assert {path.name for path in run.iterdir()} == expected
    metrics = json.loads((run / "metrics.json").read_text())
    promised = {"score", "accuracy", "nll", "ece", "brier", "log_likelihood", "mean_rank"}
    promised |= {"kl_adapter_weights", "relative_bops_32", "relative_bops_16", "seconds"}
    promised |= {f"mean_bits_{t}" for t in ("weight", "A", "e", "B", "input", "hidden")}
    promised |= {"kl_rank_gate"} if "r" in method.replace("lora", "") else set()
    promised |= {"kl_bit_gate"} if "q" in method else set()
    assert promised <= set(metrics)
    if method == "lora":
        assert (metrics["relative_bops_32"], metrics["mean_rank"]) == (1, 3)
    assert ("score_before_settling" in metrics) == (method != "lora")
    assert metrics["relative_bops_16"] == pytest.approx(4 * metrics["relative_bops_32"])
    history = read_history(run)
    assert [int(row["step"]) for row in history] == list(range(24))
    phases = list(dict.fromkeys(row["phase"] for row in history))
    assert phases == ["warmup", "anneal", "joint", "settle"]  # of lora too: the prior is annealed
    assert {row["kl_weight"] for row in history if row["phase"] == "warmup"} == {"0.0"}
    if method != "lora":
        table = (run / "table.txt").read_text()
        assert table in out
        assert table.count("attention.self.query") == 2
    assert not (run / "history.csv").read_text().endswith(",\n")
    guide = load_file(run / "guide.safetensors")
    assert ("rank_logits" in guide) == (method in ("r", "qr"))
    assert "network.backbone.classifier.weight" in load_file(run / "head.safetensors")


def test_a_normal_posterior_of_the_adapter_weights_is_kept(command, tmp_path):
    code, _, err = command(weight_posterior="normal", weight_prior_scale=0.1)
    assert code == 0, err
    guide = load_file(tmp_path / "run" / "guide.safetensors")
    assert guide["log_scale"].shape == guide["loc"].shape
    assert guide["log_scale"].unique().numel() > 1  # it was trained
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["kl_adapter_weights"] > 0


def test_same_seed_same_history_and_another_seed_another(command, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert command(seed=seed, output_dir=tmp_path / name)[0] == 0
    text = {name: (tmp_path / name / "history.csv").read_text() for name in "abc"}
    assert text["a"] == text["b"]
    assert text["a"] != text["c"]


def test_the_saved_configuration_repeats_the_run(command, tmp_path):
    options = {"price": 50, "weight_prior_scale": None, "overwrite": "true"}
    assert command(output_dir=tmp_path / "first", **options)[0] == 0
    config = tmp_path / "first" / "config.yaml"
    # resolved: what was left to a default is there, what only a person may say is not
    settings = yaml.safe_load(config.read_text())
    assert settings["weight_prior_scale"] == Priors().adapter_weight_scale
    assert settings["gate_learning_rate"] > 0
    assert settings["task"] == "custom"
    assert "overwrite" not in settings
    assert "# classes: 0, 1\n" in config.read_text()
    again = str(tmp_path / "again")
    assert main(["finetune", "--config", str(config), "--output_dir", again]) == 0
    first, second = ((tmp_path / n / "history.csv").read_text() for n in ("first", "again"))
    assert first == second
    assert yaml.safe_load(config.read_text())["price"] == 50


def test_regression_by_inference_from_float_labels(command, inputs, tmp_path):
    files = {s: inputs / f"{s}_scores.jsonl" for s in ("train", "validation")}
    code, _, err = command(
        train_file=files["train"], validation_file=files["validation"], learning_rate=0.01
    )
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"pearson", "spearman", "nll", "crps"} <= set(metrics)
    head = load_file(tmp_path / "run" / "head.safetensors")
    assert float(head["likelihood.log_noise"]) != 0


def test_batches_of_like_length_have_less_padding(command, monkeypatch):
    padding: dict[str, float] = {}
    forward = AdaptedNetwork.forward

    def watch(self, batch, latents):
        if torch.is_grad_enabled():
            padding[strategy] += float((batch["attention_mask"] == 0).sum())
        return forward(self, batch, latents)

    monkeypatch.setattr(AdaptedNetwork, "forward", watch)
    for strategy in ("random", "group_by_length"):
        padding[strategy] = 0
        options = {"batch_size": 5, "method": "lora", "overwrite": "true"}
        assert command(train_sampling_strategy=strategy, **options)[0] == 0
    assert padding["group_by_length"] < 0.6 * padding["random"]


def test_the_loss_goes_down_with_real_weights_and_all_gates(tmp_path):
    """The embedded task on MiniLM, whose frozen features leave it at chance (0.69 nats)."""
    settings = {"epochs": 1.6, "warmup_share": 0.7, "anneal_share": 0.1, "joint_share": 0.1}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert main(["finetune", "--output_dir", str(tmp_path / "run"), *arguments]) == 0
    history = read_history(tmp_path / "run")
    log_likelihood = [float(row["log_likelihood"]) for row in history]
    assert sum(log_likelihood[-10:]) / 10 > -0.6
    assert sum(log_likelihood[:10]) / 10 < -0.65


def test_a_high_price_buys_fewer_bits(command, tmp_path):
    share = {}
    for price in (0, 3000):
        code, _, err = command(price=price, epochs=20, output_dir=tmp_path / str(price))
        assert code == 0, err
        metrics = json.loads((tmp_path / str(price) / "metrics.json").read_text())
        share[price] = metrics["relative_bops_32"]
    assert share[3000] < 0.5 * share[0]


def test_a_budget_is_approached_by_its_price(command, tmp_path):
    code, _, err = command(target_bops=0.05, epochs=40)
    assert code == 0, err
    sampled = [r for r in read_history(tmp_path / "run") if r["phase"] == "joint"]
    assert len({row["price"] for row in sampled}) > 1
    assert abs(float(sampled[-1]["expected_bops"]) - 0.05) < abs(
        float(sampled[0]["expected_bops"]) - 0.05
    ) or float(sampled[-1]["expected_bops"]) == pytest.approx(0.05, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"no_such_option": 1},
            "unrecognized arguments: --no_such_option 1; options: --alpha, .*--rank",
        ),
        ({"rank": 0}, "rank is 0: give at least 1"),
        ({"rank": "many"}, "invalid int value"),
        ({"method": "best"}, "invalid choice"),
        ({"epochs": -1}, "epochs is -1"),
        ({"epochs": "inf"}, "epochs is inf"),
        ({"learning_rate": "inf"}, "learning_rate is inf"),
        ({"max_grad_norm": "nan"}, "max_grad_norm is nan"),
        ({"seed": -1}, "seed is -1: give one from 0"),
        ({"target_bops": 2}, "target_bops is 2"),
        ({"target_bops": 0.05, "method": "lora"}, "choose another method than lora"),
        ({"target_bops": 0.05, "method": "r"}, r"every gate closed 0\.[78]\d* are left"),
        ({"warmup_share": 0.9}, "shares"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"target_modules": ".*nothing"}, "matches no linear layer.*query"),
        ({"quantized_tensors": "weight bias"}, "no such tensor"),
        ({"backbone": "no/such-model-here"}, "offline, give"),
        ({"label_column": "gold"}, "no column 'gold'; it has"),
        ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"config": "nowhere.yaml"}, "cannot read --config"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(changes, message, command, tmp_path):
    code, _, err = command(**changes)
    assert code == 2
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert re.search(message, err), err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_is_refused(command, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = command(backbone=tmp_path / "empty")
    assert code == 2
    assert "no config.json" in err


def test_a_run_is_not_overwritten_without_being_told(command, tmp_path):
    assert command(epochs=1)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    code, _, err = command(epochs=1)
    assert code == 2
    assert "--overwrite" in err
    # not even with --overwrite, if something else is wrong
    assert command(epochs=1, overwrite="true", target_modules="x")[0] == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert command(epochs=1, overwrite="true", seed=9)[0] == 0
    assert (tmp_path / "run" / "history.csv").read_bytes() != before["history.csv"]


def test_a_run_too_short_to_settle_is_decided_and_reported_all_the_same(command, tmp_path):
    code, _, err = command(epochs=0.1)  # one step
    assert code == 0, err
    assert "score_before_settling" in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_the_page_of_priors_is_what_the_command_uses(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Priors.__init__, "__defaults__", (0.5, *Priors.__init__.__defaults__[1:]))
    assert command(epochs=1, method="r")[0] == 0
    assert command(epochs=1, method="r", weight_prior_scale=1, output_dir=tmp_path / "b")[0] == 0
    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text())["kl_adapter_weights"]
        for name in ("run", "b")
    )
    assert first < second - 1  # log 0.5 a weight, and a little for their size


def test_every_method_trains_with_the_same_dropout(command, monkeypatch):
    """A pretrained backbone arrives without dropout; no method may be left so."""
    modes: dict[str, set[bool]] = {}
    forward = AdaptedNetwork.forward

    def watch(self, batch, latents):
        if torch.is_grad_enabled():
            modes[method].add(self.backbone.bert.encoder.layer[0].output.dropout.training)
        return forward(self, batch, latents)

    monkeypatch.setattr(AdaptedNetwork, "forward", watch)
    for method in ("qr", "r", "lora"):
        modes[method] = set()
        assert command(method=method, overwrite="true")[0] == 0
    assert modes == {"qr": {True}, "r": {True}, "lora": {True}}


@pytest.mark.parametrize("key", ["rankk", "overwrite"])
def test_unknown_keys_of_a_configuration_file_are_listed(key, command, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{key}: true\n")
    code, _, err = command(config=tmp_path / "c.yaml")
    assert code == 2
    assert f"unknown {key}; options: alpha" in err


def test_no_in_a_configuration_file_is_the_precision_no(tmp_path):
    (tmp_path / "c.yaml").write_text("mixed_precision: no\noutput_dir: x\n")
    assert parse(["--config", str(tmp_path / "c.yaml")]).training.mixed_precision == "no"


def test_gates_on_a_few_tensors_are_shown(command, tmp_path):
    code, _, err = command(method="q", quantized_tensors="A B", epochs=1)
    assert code == 0, err
    assert (tmp_path / "run" / "rank_and_bits.png").exists()


def test_a_loss_that_is_not_finite_names_step_phase_and_term(command, tmp_path, monkeypatch):
    forward, seen = AdaptedNetwork.forward, []

    def breaks_at_step_eight(self, batch, latents):
        if self.training:
            seen.append(latents.adapter_weights.detach().clone())
        return forward(self, batch, latents) * (torch.nan if len(seen) == 9 else 1)

    monkeypatch.setattr(AdaptedNetwork, "forward", breaks_at_step_eight)
    code, _, err = command()
    assert code == 1
    assert err.count("\n") == 1
    assert "step 8, phase anneal: " in err
    assert "log_likelihood" in err
    assert len(read_history(tmp_path / "run")) == 8
    guide = load_file(tmp_path / "run" / "guide.safetensors")
    # the last weights with a finite loss, not those that the last update made of them
    assert torch.equal(guide["loc"], seen[7])
    assert not torch.equal(guide["loc"], seen[8])
