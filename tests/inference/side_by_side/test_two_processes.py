"""Two processes that train one model, beside one that does the same work alone."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import side_by_side as work
import torch

from bayes_lora.inference import predict_file
from bayes_lora.inference.finetune import finetune

pytestmark = pytest.mark.slow

OMITTED = {"seconds", "peak_memory_mb"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def two(place, inputs):
    """What both processes found, in a folder that both have."""
    if not (place / "found-0.pt").exists():
        shutil.copytree(inputs / "model", place / "model")
        shutil.copy(inputs / "train.jsonl", place)
        shutil.copy(inputs / "validation.jsonl", place / "dev.jsonl")
        rows = (place / "dev.jsonl").read_text().splitlines() * 11  # more than one process' turn
        (place / "texts.jsonl").write_text("\n".join([*rows[:30], "{", *rows[30:]]) + "\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
                    "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, str(Path(work.__file__)), str(place)]
        both = [
            subprocess.Popen(
                command, env=os.environ | launched | {"RANK": k, "LOCAL_RANK": k},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for k in "01"
        ]  # fmt: skip
        for process in both:
            printed, _ = process.communicate(timeout=600)
            assert process.returncode == 0, printed
    return [torch.load(place / f"found-{k}.pt", weights_only=False) for k in range(2)]


def close(one, two):
    return torch.linalg.vector_norm(one - two) / torch.linalg.vector_norm(two)


def test_gradients_at_held_gates_are_those_of_the_joint_batch(two, alone):
    joint = work.gradients(next(iter(work.loader(work.EXAMPLES))))
    assert "guide.loc" in joint
    assert any(name.startswith("model.network.backbone.classifier") for name in joint)
    for found in two:
        assert found["gradients"].keys() == joint.keys()
        for name, gradient in joint.items():
            assert close(found["gradients"][name], gradient) < 1e-5, name


def test_steps_are_those_of_one_process_with_batches_of_twice_the_size(two, alone):
    change, records = work.trained(16)
    for found in two:
        mine, lines = found["trained"]
        assert close(mine, change) < 1e-5
        assert [line["loss"] for line in lines] == pytest.approx(
            [line["loss"] for line in records], rel=1e-5
        )
    assert two[0]["trained"][0].equal(two[1]["trained"][0])


def test_accumulated_steps_are_those_of_batches_of_twice_the_size(alone):
    change, records = work.trained(16)
    mine, lines = work.trained(8, accumulation=2)
    assert close(mine, change) < 1e-5
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in records], rel=1e-5
    )


def test_each_draws_for_itself_but_where_all_must_agree(two, alone):
    apart, alike, after = zip(*(found["draws"] for found in two), strict=True)
    assert alike[0].equal(alike[1])
    assert not apart[0].equal(apart[1])
    assert not after[0].equal(after[1])
    by_itself = work.draws()  # the main process draws what it would alone
    assert apart[0].equal(by_itself[0])


def test_predictions_are_shared_and_all_get_all(two, alone):
    expected = work.predicted()
    assert expected.shape == (work.EXAMPLES, 2)
    for found in two:
        assert np.array_equal(found["predicted"], expected)
        assert found["share"] == list("abcde")
        assert (found["most"], found["of_main"]) == ([1.5, 1.0], 0)


def test_a_run_is_written_by_the_main_process_alone(two, place):
    writes = [{Path(name).name for _, name in found["writes"]} for found in two]
    assert "metrics.json.partial" in writes[0]
    assert writes[1] == set()
    header = (place / "whole" / "config.yaml").read_text()
    assert "# processes: 2" in header
    lines = (place / "whole" / "history.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 120 // (2 * 10)
    assert "already holds a run" in two[0]["refused"]
    assert two[0]["refused"] == two[1]["refused"]


def test_both_know_the_results(two, place):
    for name in ("metrics", "resumed", "refined", "chains"):
        mine = [{k: v for k, v in found[name].items() if k not in OMITTED} for found in two]
        assert mine[0] == mine[1], name
    written = json.loads((place / "whole" / "metrics.json").read_text())
    assert two[0]["metrics"] == written


def test_a_signal_to_one_stops_both_and_both_go_on(two, place):
    assert [found["exit"] for found in two] == [143, 143]
    for name in ("history.csv", "table.txt", "decision.json"):
        both = [(place / run / name).read_bytes() for run in ("whole", "stopped")]
        assert both[0] == both[1], name
    for found in two:
        whole, resumed = (
            {k: v for k, v in found[name].items() if k not in OMITTED}
            for name in ("metrics", "resumed")
        )
        assert whole == resumed


def test_a_refinement_that_was_stopped_goes_on_in_both(two, place):
    assert (place / "halted" / "history.csv").read_bytes() == (
        place / "refined" / "history.csv"
    ).read_bytes()
    for found in two:
        assert found["halted"] == 143
        assert "step-4-refined-2" in found["kept"]
        whole, resumed = (
            {k: v for k, v in found[name].items() if k not in OMITTED}
            for name in ("refined", "refined on")
        )
        assert whole == resumed


def test_chains_are_those_of_one_process(two, place, alone):
    words = ("--output_dir", place / "alone", "--restarts", 2, "--epochs", 1)
    finetune(work.configured(place, *words))
    for chain in ("restart-0", "restart-1"):
        for name in ("history.csv", "table.txt"):
            both = [(place / run / chain / name).read_bytes() for run in ("chains", "alone")]
            assert both[0] == both[1], name


def test_a_checkpoint_of_two_processes_is_not_one_of_a_single(two, place, alone):
    config = work.configured(place, "--output_dir", place / "whole", "--resume")
    assert finetune(config)["score"] == two[0]["metrics"]["score"]  # finished: read


def test_rows_of_a_file_are_shared_and_written_once_in_their_order(two, place, alone):
    words = [place / "whole", "--input", place / "texts.jsonl", "--output", place / "one.csv"]
    predict_file.run([str(word) for word in words])
    one, both = ((place / name).read_text().splitlines() for name in ("one.csv", "two.csv"))
    assert len(one) == 1 + 661
    assert both == one
    assert "JSON" in one[31]
