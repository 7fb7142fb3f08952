"""`bayes_lora.load` on runs and exports of tiny models: predictions, saving, damage."""

import json
from shutil import copytree

import numpy as np
import pytest
import torch

import bayes_lora
from bayes_lora.inference import loading
from bayes_lora.inference.cli import main
from bayes_lora.inference.trained import read_run, validation

TEXTS = ["the key to the cabinets is here .", "the dogs sings ."]


def test_load_predicts_as_the_run_does(decided_run, tmp_path):
    folder = decided_run()
    found = bayes_lora.load(folder)
    at_decision = found.predict(TEXTS)
    assert at_decision["probabilities"].shape == (2, 2)
    assert (at_decision["entropy_posterior"] == 0).all()
    averaged = found.predict(TEXTS, draws=6, seed=1)
    total = averaged["entropy_data"] + averaged["entropy_posterior"]
    np.testing.assert_allclose(total, averaged["entropy"], atol=1e-6)
    assert (averaged["entropy_posterior"] > 1e-6).all()
    state = torch.get_rng_state()
    again = found.predict(TEXTS, draws=6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(again["probabilities"], averaged["probabilities"])
    found.save_pretrained(tmp_path / "saved")
    saved = bayes_lora.load(tmp_path / "saved")
    np.testing.assert_allclose(
        saved.predict(TEXTS)["probabilities"], at_decision["probabilities"], atol=1e-5
    )
    with pytest.raises(bayes_lora.InputError, match="without a posterior"):
        saved.predict(TEXTS, draws=2)
    saved.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").exists()


@pytest.mark.parametrize("texts", ["one text", [], [3], [None], [("a", "b")], ["fine", ("a", "b")]])
def test_texts_that_are_none_are_refused(decided_run, texts):
    with pytest.raises(bayes_lora.InputError, match=r"a list of texts|this task has: sentence"):
        bayes_lora.load(decided_run()).predict(texts)


@pytest.mark.parametrize("damage", ["bayes_lora.json", "packed.safetensors"])
def test_a_damaged_export_is_refused(decided_run, tmp_path, damage):
    folder = decided_run()
    to = tmp_path / "packed"
    assert main(["export", str(folder), "--format", "packed", "--to", str(to)]) == 0
    (to / damage).write_bytes((to / damage).read_bytes()[:-50])
    with pytest.raises(bayes_lora.InputError, match="is damaged"):
        bayes_lora.load(to)


@pytest.mark.parametrize(
    ("form", "lost"),
    [("packed", "tokenizer.json"), ("packed", "config.json"), ("merged", "model.safetensors"),
     ("peft", "tokenizer.json")],
)  # fmt: skip
def test_an_export_without_one_of_its_files_is_refused(decided_run, tmp_path, form, lost):
    """Without its tokenizer.json a made-up one would predict something."""
    to = tmp_path / "export"
    assert main(["export", str(decided_run()), "--format", form, "--to", str(to)]) == 0
    for name in ("README.md", "merge_report.json"):  # are for people
        (to / name).unlink(missing_ok=True)
    assert bayes_lora.load(to).predict(TEXTS)["label"].shape == (2,)
    (to / lost).unlink()
    with pytest.raises(bayes_lora.InputError, match=f"{lost} is not there"):
        bayes_lora.load(to)


def test_an_export_whose_backbone_is_gone_says_so(decided_run, inputs, tmp_path):
    model, to = tmp_path / "model", tmp_path / "peft"
    copytree(inputs / "model", model)
    folder = decided_run(backbone=model)
    assert main(["export", str(folder), "--format", "peft", "--to", str(to)]) == 0
    model.rename(tmp_path / "moved")
    with pytest.raises(bayes_lora.InputError, match="needs its backbone: cannot load backbone"):
        bayes_lora.load(to)


def test_what_bayes_lora_json_does_not_tell_of_is_noticed(decided_run, tmp_path):
    to = tmp_path / "packed"
    assert main(["export", str(decided_run()), "--format", "packed", "--to", str(to)]) == 0
    content = json.loads((to / "bayes_lora.json").read_text())
    layer = next(
        layer for layer in content["layers"].values() if layer["bits"]["A"] > 2 and layer["rank"]
    )
    layer["bits"]["A"] = 2
    (to / "bayes_lora.json").write_text(json.dumps(content))
    with pytest.raises(bayes_lora.InputError, match="is damaged"):
        bayes_lora.load(to)


def test_the_hub_gets_the_folder(decided_run, monkeypatch):
    sent = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            sent["made"] = repo_id, private

        def upload_folder(self, repo_id, folder_path):
            sent["files"] = sorted(path.name for path in folder_path.iterdir())
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(loading, "HfApi", Api)
    address = bayes_lora.load(decided_run()).push_to_hub("me/tiny", private=True)
    assert address == "https://huggingface.co/me/tiny"
    assert sent["made"] == ("me/tiny", True)
    assert {"README.md", "bayes_lora.json", "packed.safetensors"} <= set(sent["files"])


def test_a_hub_that_refuses_is_one_line(decided_run, monkeypatch):
    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            raise OSError("401\nlog in")

    monkeypatch.setattr(loading, "HfApi", Api)
    with pytest.raises(bayes_lora.InputError, match=r"does not take me/tiny \(401 log in\)"):
        bayes_lora.load(decided_run()).push_to_hub("me/tiny")


def test_a_regression_on_a_decoder_can_be_packed(decided_run, inputs, tmp_path, capsys):
    """Its head has no bias to take in where the labels lie."""
    files = {f"{split}_file": inputs / f"{split}_scores.jsonl" for split in ("train", "validation")}
    folder = decided_run("gpt2", **files, method="r")
    words = ["export", str(folder), "--to", str(tmp_path / "to"), "--format"]
    assert main([*words, "merged"]) == 2
    assert (
        "a bias, for the units of the labels to go into: choose packed" in capsys.readouterr().err
    )
    assert main([*words, "packed"]) == 0
    wanted = bayes_lora.load(folder).predict(TEXTS)
    found = bayes_lora.load(tmp_path / "to").predict(TEXTS)
    np.testing.assert_allclose(found["label"], wanted["label"], atol=1e-5)
    np.testing.assert_allclose(found["variance"], wanted["variance"], rtol=1e-5)


@pytest.mark.parametrize("form", ["peft", "merged", "packed"])
def test_a_regression_is_exported_in_units_of_its_labels(decided_run, inputs, tmp_path, form):
    files = {f"{split}_file": inputs / f"{split}_scores.jsonl" for split in ("train", "validation")}
    folder = decided_run(**files, method="r")
    assert main(["export", str(folder), "--format", form, "--to", str(tmp_path / form)]) == 0
    wanted = bayes_lora.load(folder).predict(TEXTS)
    found = bayes_lora.load(tmp_path / form).predict(TEXTS)
    np.testing.assert_allclose(found["label"], wanted["label"], atol=1e-5)
    np.testing.assert_allclose(found["variance"], wanted["variance"], rtol=1e-5)
    run_labels = np.asarray(validation(read_run(folder))[1])
    assert abs(found["label"].mean() - run_labels.mean()) < 3 * run_labels.std()
