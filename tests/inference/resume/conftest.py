"""Runs that are stopped, and whether two runs left the same."""

import json
from contextlib import contextmanager

import arviz as az
import pytest
from safetensors.torch import load_file

from bayes_lora.inference import checkpoint

OUTPUTS = ("decision.json", "task.json", "table.txt", "history.csv")


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def _killed_after(count):
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


@pytest.fixture
def killed_after():
    """Inside `killed_after(count)`, the process ends after so many checkpoints are written."""
    return _killed_after


def _same(one, two):
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


@pytest.fixture
def same():
    """Assert that two runs left the same, but for the time they took."""
    return _same


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(command, place):
    """Folder of a run that was not stopped, trained once for all tests."""
    if not (place / "run" / "posterior.nc").exists():
        assert command(output_dir=place / "run")[0] == 0
    return place / "run"


@pytest.fixture
def stopped(command, tmp_path, killed_after):
    """Folder of a run that was killed after its third checkpoint."""

    def make(**changes):
        with killed_after(3):
            command(save_steps=5, **changes)
        return tmp_path / "run"

    return make
