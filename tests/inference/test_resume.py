"""A training that was stopped goes on, and ends as if it had not been."""

import json
import shutil
from contextlib import contextmanager

import arviz as az
import pytest
from safetensors.torch import load_file

from bayes_lora.inference import checkpoint

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
    assert all(found.pop("seconds") > 0 for found in metrics)
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
