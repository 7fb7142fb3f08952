"""Everything a user can get wrong with the command is one line, and nothing is lost."""

import errno
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from bayes_lora.inference import assemble, train_run
from bayes_lora.inference.cli import main, report_errors
from bayes_lora.models.priors import CostWeightedGates, IndependentGates, Priors
from bayes_lora.network import AdaptedNetwork


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
        ({"weight_temperature": 0}, "weight_temperature is 0"),
        ({"seed": -1}, "seed is -1: give one from 0"),
        ({"seed": 2**32 - 1, "restarts": 2}, "restarts counted in"),
        ({"data_seed": -1}, "data_seed is -1"),
        ({"target_bops": 2}, "target_bops is 2"),
        ({"target_bops": 0.3}, r"with every gate open it is 0\.25"),
        ({"target_bops": 0.05, "method": "lora"}, "choose another method than lora"),
        ({"target_bops": 0.1, "joint_share": 0}, "target_bops needs joint steps"),
        ({"target_bops": 0.05, "method": "r"}, r"every gate closed 0\.[78]\d* are left"),
        ({"warmup_share": 0.9}, "shares"),
        ({"refine_epochs": 1}, "leave input and hidden out of --quantized_tensors"),
        ({"refine_epochs": 1, "method": "lora"}, "refine_epochs needs gates"),
        ({"refine_epochs": -1, "method": "r"}, "refine_epochs is -1"),
        ({"draws": 0}, "draws is 0"),
        ({"restarts": 0}, "restarts is 0"),
        ({"prior_predictive": "true", "target_bops": 0.05}, "give --price, not --target_bops"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"target_modules": ".*nothing"}, "matches no linear layer.*query"),
        ({"quantized_tensors": "weight bias"}, "no such tensor"),
        ({"backbone": "no/such-model-here"}, "offline, give"),
        ({"label_column": "gold"}, "no column 'gold'; it has"),
        ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"config": "nowhere.yaml"}, "cannot read --config"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(changes, message, command, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub client, between its tries
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


@pytest.mark.parametrize("key", ["rankk", "overwrite"])
def test_unknown_keys_of_a_configuration_file_are_listed(key, command, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{key}: true\n")
    code, _, err = command(config=tmp_path / "c.yaml")
    assert code == 2
    assert f"unknown {key}; options: alpha" in err


def test_a_loss_that_is_not_finite_names_step_phase_and_term(
    command, tmp_path, monkeypatch, read_history
):
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


def test_a_gradient_that_is_not_finite_names_its_parameter(command, monkeypatch):
    forward = AdaptedNetwork.forward

    def breaks(self, batch, latents):
        self.backbone.classifier.bias.register_hook(lambda g: g * torch.nan)
        return forward(self, batch, latents)

    monkeypatch.setattr(AdaptedNetwork, "forward", breaks)
    code, _, err = command()
    assert code == 1
    assert err.count("\n") == 1
    found = re.search("step 0, phase warmup: gradient of (.*) not finite", err)
    assert found is not None
    assert found[1].endswith("classifier.bias")
    assert "," not in found[1]


def test_a_gradient_whose_norm_overflows_is_told(command, monkeypatch):
    forward = AdaptedNetwork.forward

    def breaks(self, batch, latents):
        self.backbone.classifier.bias.register_hook(lambda g: torch.full_like(g, 1e30))
        return forward(self, batch, latents)

    monkeypatch.setattr(AdaptedNetwork, "forward", breaks)
    code, _, err = command()
    assert code == 1
    assert "step 0, phase warmup: norm of the gradient not finite" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_backbone_that_is_not_finite_is_refused_by_name(command, inputs, tmp_path, value):
    folder = shutil.copytree(inputs / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name][3, 2] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code, _, err = command(backbone=folder)
    assert code == 2
    assert f"{name} is not finite" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("file", ["guide.safetensors", "head.safetensors"])
def test_a_run_that_is_not_finite_is_refused_by_name(command, tmp_path, file, capsys):
    assert command(epochs=1)[0] == 0
    path = tmp_path / "run" / file
    weights = load_file(path)
    name = next(n for n in weights if n in ("loc", "network.backbone.classifier.weight"))
    weights[name].view(-1)[1] = torch.nan
    save_file(weights, path)
    capsys.readouterr()
    assert main(["decide", str(tmp_path / "run")]) == 2
    assert f"{file} is damaged, {name} is not finite" in capsys.readouterr().err


def test_parameters_of_the_very_last_step_are_looked_at_too(command, tmp_path):
    code, _, err = command(learning_rate=1e30, epochs=0.1)  # one step
    assert code == 1
    assert err.count("\n") == 1
    assert "step 0, phase " in err
    guide = load_file(tmp_path / "run" / "guide.safetensors")
    assert guide["loc"].abs().max() <= 1  # as drawn


def test_predictions_that_are_not_finite_are_one_line(command, monkeypatch):
    forward = AdaptedNetwork.forward

    def breaks_outside_training(self, batch, latents):
        return forward(self, batch, latents) * (1 if self.training else torch.nan)

    monkeypatch.setattr(AdaptedNetwork, "forward", breaks_outside_training)
    code, _, err = command(epochs=1)
    assert code == 1
    assert err.count("\n") == 1
    assert "predictions not finite" in err


def test_a_budget_that_was_missed_is_said(command):
    # gates that cannot move, all more probably open
    with pytest.warns(UserWarning, match=r"not the 1\.00% wanted: the data ask for more"):
        assert command(target_bops=0.01, gate_learning_rate=1e-9)[0] == 0


def test_a_budget_that_the_data_do_not_ask_for_is_said(command, monkeypatch):
    def close_bits(model, guide):
        guide.bit_logits.data.fill_(-5.0)

    monkeypatch.setattr(train_run, "meet_budget", close_bits)
    with pytest.warns(UserWarning, match=r"not the 20\.00% wanted: the data ask for no more"):
        assert command(target_bops=0.2)[0] == 0


@pytest.mark.parametrize(
    ("option", "page", "says"),
    [("price", IndependentGates(), "price"), ("target_bops", CostWeightedGates(), "target_bops")],
)
def test_an_option_that_the_prior_of_the_page_does_not_have(
    option, page, says, command, monkeypatch
):
    monkeypatch.setattr(assemble, "Priors", lambda: Priors(gates=page))
    code, _, err = command(**{option: 0.5})
    assert code == 2
    assert f"{says} is not for the {type(page).__name__} of models/priors.py" in err


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some"), (errno.EROFS, "check its permissions")]
)
def test_what_a_disk_refuses_is_one_line(number, advice, capsys):
    def command(words):
        raise OSError(number, os.strerror(number), "runs/a")

    assert report_errors(command, []) == 2
    error = capsys.readouterr().err
    assert f"{os.strerror(number)}, runs/a: {advice}" in error
    assert error.count("\n") == 1


def test_sigterm_ends_any_command_in_one_line(capsys):
    before = signal.getsignal(signal.SIGTERM)
    begun = []

    def command(words):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:  # as libraries have it
            begun.append("went on")
        begun.append("went on")

    assert report_errors(command, []) == 143
    error = capsys.readouterr().err
    assert error == "bayes-lora: stopped by SIGTERM; no file is half written\n"
    assert not begun
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "file"), [(errno.ENOENT, "template"), (errno.EPERM, None)])
def test_a_fault_of_the_program_keeps_its_traceback(number, file):
    def command(words):
        raise OSError(number, os.strerror(number), file)

    with pytest.raises(OSError, match=os.strerror(number)):
        report_errors(command, [])
