"""Nothing that a folder brings is run, nothing is written elsewhere, and no network is needed."""

import json
import os
import pickle
import socket
import sys
from pathlib import Path

import pytest
import torch

import bayes_lora
from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.cli import main


class Watch:
    """What Python's audit events say of files written and pickles read; hooks stay for good."""

    def __init__(self):
        self.on, self.written, self.unpickled = False, set(), []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            if set(mode or "") & set("wax+") or (
                mode is None and flags & (os.O_WRONLY | os.O_RDWR)
            ):
                self.written.add(Path(path).absolute())
        elif event in ("os.mkdir", "os.rename"):
            self.written.add(Path(os.fsdecode(arguments[event == "os.rename"])).absolute())
        elif event == "pickle.find_class":
            self.unpickled.append(arguments)


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture
def no_network(monkeypatch):
    def connect(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_a_run_and_what_comes_of_it_stay_in_their_folders(
    command, watch, no_network, inputs, tmp_path
):
    new = tmp_path / "new.jsonl"
    new.write_text('{"sentence": "the key is here ."}\n')
    watch.on = True
    try:
        assert command(price=3, save_steps=5)[0] == 0
        run = str(tmp_path / "run")
        for words in (
            ["diagnose", run],
            ["decide", run, "--max_bops", "0.5"],
            ["export", run, "--format", "packed", "--with_base", "--to", str(tmp_path / "packed")],
            ["predict", run, "--input", str(new), "--output", str(tmp_path / "out.csv")],
        ):
            assert main(words) == 0
        bayes_lora.load(tmp_path / "packed").predict(["the key is here ."])
    finally:
        watch.on = False
    outside = [path for path in watch.written if not path.is_relative_to(tmp_path)]
    assert outside in ([], [Path(os.devnull)])
    names = {path.name for path in watch.written}
    assert {"metrics.json", "report.html", "decision.json", "packed", "out.csv"} <= names
    assert watch.unpickled == []


def test_code_of_a_backbone_is_not_run(inputs, tmp_path, monkeypatch):
    """Nor is it asked whether to."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (inputs / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {
        "AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match="cannot load backbone"):
        load_backbone(str(folder), 2)
    assert not (tmp_path / "ran").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_of_weights_runs_nothing(inputs, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (inputs / "model").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"classifier.weight": Trap(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load backbone"):
        load_backbone(str(folder), 2)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Trap(str(tmp_path / "ran"))))  # the trap works
    assert (tmp_path / "ran").exists()


def test_offline_a_name_of_the_hub_is_looked_up_nowhere(no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load backbone 'some/model'"):
        load_backbone("some/model", 2)
