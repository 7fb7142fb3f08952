"""Checkpoints that are damaged, of another run, or find no room."""

import errno
import os

import pytest

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
