"""A training that was stopped goes on, and ends as if it had not been."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from contextlib import contextmanager

import arviz as az
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from bayes_lora.inference import cells, checkpoint
from bayes_lora.inference.checkpoint import found
from bayes_lora.inference.cli import main

OUTPUTS = ("decision.json", "task.json", "table.txt", "history.csv")


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_after(count):
    """Inside, the process ends right after so many checkpoints are written."""
    written, write = [], checkpoint._write

    def counted(*arguments):
        write(*arguments)
        written.append(1)
        if len(written) == count:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_write", counted)
        with pytest.raises(Killed):
            yield


def same(one, two):
    """Whether two runs left the same, but for the time they took."""
    for name in OUTPUTS:
        if (one / name).exists() or (two / name).exists():
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in ("guide.safetensors", "head.safetensors"):
        tensors = load_file(one / name), load_file(two / name)
        assert tensors[0].keys() == tensors[1].keys()
        assert all(tensor.equal(tensors[1][key]) for key, tensor in tensors[0].items())
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert all(each.pop("seconds") > 0 for each in metrics)
    for each in metrics:
        each.pop("peak_memory_mb", None)
    assert metrics[0] == metrics[1]
    bundles = [az.from_netcdf(str(run / "posterior.nc")).load() for run in (one, two)]
    for group in bundles[0].groups():
        assert bundles[0][group].identical(bundles[1][group]), group


CASES = {
    "qr": ({}, (1, 3, 5, 8)),
    "by length": ({"train_sampling_strategy": "group_by_length"}, (4,)),
    "refined": ({"method": "r", "refine_epochs": 1}, (6,)),
    "normal": ({"method": "lora", "weight_posterior": "normal"}, (2,)),
    "budget": ({"target_bops": 0.5}, (5,)),
    "nothing settles": ({"joint_share": 0.55}, (3, 7)),
}
"""Options, and after which checkpoint the run is killed; the last one is that of all steps."""


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_one_that_was_not_stopped(command, tmp_path, case):
    changes, counts = CASES[case]
    changes |= {"save_steps": 5}
    assert command(**changes, output_dir=tmp_path / "whole")[0] == 0
    for count in counts:
        with killed_after(count):
            command(**changes)
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == min(
            count, 3
        )  # not rotated yet
        history = (tmp_path / "run" / "history.csv").read_text()
        (tmp_path / "run" / "history.csv").write_text(history + "7,joint,1.0,0.6")  # torn
        code, _, err = command(**changes, resume="")
        assert code == 0, err
        same(tmp_path / "run", tmp_path / "whole")
        assert not (tmp_path / "run" / "checkpoints").exists()
        shutil.rmtree(tmp_path / "run")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(command, place):
    """Folder of a run that was not stopped, trained once for all tests."""
    if not (place / "run" / "posterior.nc").exists():
        assert command(output_dir=place / "run")[0] == 0
    return place / "run"


@pytest.fixture
def stopped(command, tmp_path):
    """Folder of a run that was killed after its third checkpoint."""

    def make(**changes):
        with killed_after(3):
            command(save_steps=5, **changes)
        return tmp_path / "run"

    return make


def flip(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    """Lose the end."""
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip, cut, os.remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    command, stopped, whole, file, damage
):
    run = stopped()
    last = found(run / "checkpoints")[-1]
    damage(last / file)
    code, _, err = command(save_steps=5, resume="")
    assert code == 0, err
    assert f"{last} is damaged" in err
    same(run, whole)


def test_without_a_whole_checkpoint_nothing_is_lost_in_silence(command, stopped):
    run = stopped()
    for path in found(run / "checkpoints"):
        flip(path / "state.json")
    code, _, err = command(resume="")
    assert code == 2
    assert err.splitlines()[-1] == (
        f"bayes-lora: error: no checkpoint in {run}/checkpoints is whole: train anew, "
        "with --overwrite"
    )
    assert len(found(run / "checkpoints")) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.002}, "made with learning_rate 0.001, not 0.002"),
        ({"rank": 2}, "made with rank 3, not 2"),
        ({"seed": 1}, "made with seed 0, not 1"),
        ({"epochs": 5}, "made with epochs 4.0, not 5.0"),
        ({"overwrite": ""}, "overwrite and resume exclude each other"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(command, stopped, changes, said):
    run = stopped()
    code, _, err = command(resume="", **changes)
    assert code == 2
    assert said in err
    assert len(found(run / "checkpoints")) == 3


def test_a_checkpoint_of_other_data_is_refused(command, stopped, inputs, tmp_path):
    mine = tmp_path / "mine.jsonl"
    rows = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    mine.write_text("".join(rows))
    stopped(train_file=mine)
    mine.write_text("".join([*rows[1:], rows[0]]))
    code, _, err = command(resume="", train_file=mine)
    assert code == 2
    assert "is of other data" in err


def test_a_full_disk_leaves_the_last_checkpoint(command, whole, tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def full(descriptor):
        flushed.append(1)
        if len(flushed) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = command(save_steps=5)
    assert code == 2
    assert "cannot write a checkpoint" in err
    assert "No space left on device" in err
    folder = tmp_path / "run" / "checkpoints"
    assert list(folder.iterdir()) == found(folder) != []
    assert command(resume="")[0] == 0
    same(tmp_path / "run", whole)


def test_resume_begins_what_has_not_begun_and_leaves_what_is_finished(command, tmp_path):
    assert command(resume="")[0] == 0
    before = (tmp_path / "run" / "metrics.json").stat().st_mtime_ns
    code, out, err = command(resume="")
    assert code == 0
    assert "is finished already" in err
    assert "score" in out
    assert (tmp_path / "run" / "metrics.json").stat().st_mtime_ns == before


def test_resume_does_not_replace_what_it_cannot_go_on_with(command, tmp_path):
    with killed_after(2):
        command(restarts=2)
    code, _, err = command(resume="")  # without --restarts
    assert code == 2
    assert "already holds a run (restart-0)" in err
    assert found(tmp_path / "run" / "restart-0" / "checkpoints")


def test_a_run_goes_on_by_its_own_configuration(stopped, whole):
    run = stopped()
    words = ["--config", str(run / "config.yaml"), "--output_dir", str(run), "--resume"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["finetune", *words]) == 0
    same(run, whole)


def test_restarts_go_on_with_the_one_that_was_stopped(command, tmp_path):
    assert command(restarts=2, output_dir=tmp_path / "whole")[0] == 0
    with killed_after(5):  # the first has four
        command(restarts=2)
    assert command(restarts=2, resume="")[0] == 0
    for k in range(2):
        same(tmp_path / "run" / f"restart-{k}", tmp_path / "whole" / f"restart-{k}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_says_so(command, whole, tmp_path, monkeypatch, number):
    due = checkpoint.Keeper.due

    def interrupted(keeper, step):
        if step == 13:
            signal.raise_signal(number)
        return due(keeper, step)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Keeper, "due", interrupted)
        code, _, err = command()
    assert code == 128 + number
    assert f"by {number.name}" in err
    assert "--resume" in err
    assert found(tmp_path / "run" / "checkpoints")[-1].name == "step-14"  # that under way
    assert command(resume="")[0] == 0
    same(tmp_path / "run", whole)


def test_a_cell_of_a_comparison_goes_on(small_run, few_draws, tmp_path):
    small = small_run | {"rank": 3, "batch_size": 20, "draws": 2}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    cells.train_cell("r", words, tmp_path / "whole")
    with killed_after(2):
        cells.train_cell("r", words, tmp_path / "cell")
    before = (tmp_path / "cell" / "config.yaml").stat().st_mtime_ns
    cells.train_cell("r", words, tmp_path / "cell")
    assert (tmp_path / "cell" / "config.yaml").stat().st_mtime_ns == before  # not begun anew
    same(tmp_path / "cell", tmp_path / "whole")


KILLS = 20


def test_killed_at_random_moments(small_run, tmp_path):
    """Whatever a process does when it is killed, the next one goes on from the last checkpoint."""
    small = small_run | {"rank": 3, "batch_size": 20, "draws": 2, "save_steps": 1}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["bayes_lora.inference.finetune"])

    def train(name, seconds=None):
        """Train in a process of its own, which is killed after so many seconds."""
        words = ["finetune", "--resume", "--output_dir", str(tmp_path / name), *options]
        process = server.Process(target=main, args=(words,))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    assert train("whole") is not None
    moments = np.random.default_rng(0)
    kills = last = 0
    while kills < KILLS:
        if train("run", moments.uniform(0.5, 2.5)) == -signal.SIGKILL:
            kills += 1
            reached = [int(path.name[5:]) for path in found(tmp_path / "run" / "checkpoints")]
            assert max(reached, default=0) >= last
            last = max(reached, default=0)
        else:  # finished before: that is no kill
            same(tmp_path / "run", tmp_path / "whole")
            shutil.rmtree(tmp_path / "run")
            last = 0
    train("run")
    same(tmp_path / "run", tmp_path / "whole")
