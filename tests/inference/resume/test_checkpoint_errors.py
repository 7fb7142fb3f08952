"""Checkpoints that are damaged, of another run, or find no room."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bayes_lora.inference.checkpoint import found


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
    command, stopped, whole, file, damage, same
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


@pytest.mark.parametrize("content", ["[]", "3", "null", '"x"', "[" * 100_000])
def test_a_checkpoint_whose_numbers_are_something_else_is_damaged(command, stopped, content):
    run = stopped()
    last = found(run / "checkpoints")[-1]
    (last / "state.json").write_text(content)
    (run / "checkpoints" / "step-\u00b2").mkdir()  # a digit, and no number
    code, _, err = command(save_steps=5, resume="")
    assert code == 0, err
    assert f"{last} is damaged" in err


def test_a_checkpoint_of_another_run_is_named_and_the_one_before_it_used(
    command, stopped, whole, same, tmp_path, killed_after
):
    run = stopped()
    with killed_after(3):
        command(save_steps=5, seed=1, output_dir=tmp_path / "other")
    foreign = run / "checkpoints" / "step-999"
    shutil.copytree(found(tmp_path / "other" / "checkpoints")[-1], foreign)
    code, _, err = command(save_steps=5, resume="")
    assert code == 0, err
    assert f"{foreign} was made with seed 1, not 0: it is left out" in err
    same(run, whole)


def test_what_was_refused_is_not_one_of_those_that_are_kept(command, stopped, killed_after):
    run = stopped()
    last = found(run / "checkpoints")[-1]
    damaged = run / "checkpoints" / "step-999"
    shutil.copytree(last, damaged)
    flip(damaged / "state.json")
    with killed_after(2):
        command(save_steps=1, save_total_limit=1, resume="")
    step = int(last.name[5:])
    names = [path.name for path in found(run / "checkpoints")]
    assert names == [f"step-{step + 1}", f"step-{step + 2}", "step-999"]  # the second not rotated
    code, _, err = command(save_total_limit=1, resume="")
    assert code == 0, err


def test_a_checkpoint_of_another_backbone_is_refused(command, stopped, inputs, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(inputs / "model", mine)
    stopped(backbone=mine)
    weights = load_file(mine / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name] += 0.01
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command(resume="", backbone=mine)
    assert code == 2
    assert "is of another backbone: give the same" in err


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


def test_a_full_disk_leaves_the_last_checkpoint(command, whole, tmp_path, monkeypatch, same):
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


def test_a_full_disk_at_the_end_is_one_line(command, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if path.name.startswith("guide.safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        code, _, err = command(save_steps=5)
    assert code == 2
    assert err.splitlines()[-1].startswith("bayes-lora: error: No space left on device")
    assert command(resume="")[0] == 0


def test_restarts_do_not_replace_a_finished_run(command, whole):
    before = (whole / "metrics.json").read_bytes()
    code, _, err = command(output_dir=whole, resume="", restarts=2)
    assert code == 2
    assert "already holds a run" in err
    assert (whole / "metrics.json").read_bytes() == before


def test_a_run_that_replaces_stopped_restarts_leaves_nothing_of_them(
    command, tmp_path, killed_after
):
    with killed_after(2):
        command(restarts=2, save_steps=5)
    assert found(tmp_path / "run" / "restart-0" / "checkpoints")
    assert command(overwrite="")[0] == 0
    assert not (tmp_path / "run" / "restart-0").exists()
