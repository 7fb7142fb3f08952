"""Nothing that a folder brings is run, nothing is written elsewhere, and no network is needed."""

import json
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

import bayes_lora
from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.cli import main
from bayes_lora.inference.costs import meta_network
from bayes_lora.inference.export import export
from bayes_lora.inference.trained import read_run


class Watch:
    """What Python itself writes and unpickles, by its audit events; hooks stay for good.

    Libraries in C write their own way: HDF5, safetensors and Arrow are not seen.
    """

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
    """Nobody asks for an address or a connection, whatever becomes of the error."""
    tried = []

    def refuse(*given, **_):
        tried.append(given)
        raise OSError("no network here")

    for owner, name in ((socket, "getaddrinfo"), (socket.socket, "connect"),
                        (socket.socket, "connect_ex")):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    yield
    assert tried == []


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


def own_code(folder, source, model_type, ran):
    """A model folder that brings code of its own for what transformers does not have."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    file = folder / "config.json"
    classes = dict.fromkeys(("AutoConfig", "AutoModelForSequenceClassification"), "own.Own")
    content = json.loads(file.read_text()) | {"model_type": model_type, "auto_map": classes}
    file.write_text(json.dumps(content))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    return folder


@pytest.mark.parametrize("model_type", ["own", "encodec"])  # transformers has no classifier of it
@pytest.mark.parametrize("reader", ["load_backbone", "load", "meta_network"])
def test_code_of_a_folder_is_not_run(
    reader, model_type, decided_run, inputs, tmp_path, monkeypatch
):
    """Nor is it asked whether to."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"
    read = {
        "load_backbone": lambda folder: load_backbone(folder, 2),
        "load": bayes_lora.load,
        "meta_network": lambda folder: meta_network(folder, 2, "all-linear"),
    }[reader]
    source = inputs / "model"
    if reader == "load":
        source = tmp_path / "packed"
        export(read_run(decided_run()), "packed", source, with_base=True)
    with pytest.raises(InputError, match=r"cannot (load|build) backbone|is damaged"):
        read(str(own_code(tmp_path / "model", source, model_type, ran)))
    assert not ran.exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_of_weights_runs_nothing(inputs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(inputs / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
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
