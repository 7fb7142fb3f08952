"""A training that was stopped goes on, and ends as if it had not been."""

import shutil
import signal

import pytest
from accelerate.state import AcceleratorState

from bayes_lora.inference import cells, checkpoint, processes, results
from bayes_lora.inference.checkpoint import found
from bayes_lora.inference.cli import main
from bayes_lora.inference.slopes import Slopes

CASES = {
    "qr": ({}, (1, 3, 5, 8)),
    "by length": ({"train_sampling_strategy": "group_by_length"}, (4,)),
    "refined": ({"method": "r", "refine_epochs": 1}, (6,)),
    "normal": ({"method": "lora", "weight_posterior": "normal"}, (2,)),
    "budget": ({"target_bops": 0.2}, (5,)),
    "nothing settles": ({"joint_share": 0.55}, (3, 7)),
}
"""Options, and after which checkpoint the run is killed; the last one is that of all steps."""


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_one_that_was_not_stopped(command, tmp_path, case, killed_after, same):
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


@pytest.mark.parametrize("count", [18, 24])  # in the first pass of the refinement, and later
def test_a_refinement_goes_on_where_it_was_stopped(command, tmp_path, killed_after, same, count):
    changes = {
        "quantized_tensors": "weight A e B", "target_bops": 0.2, "weight_posterior": "normal",
        "refine_epochs": 7, "save_steps": 1,
    }  # fmt: skip
    assert command(**changes, output_dir=tmp_path / "whole")[0] == 0
    with killed_after(count):
        command(**changes)
    last = found(tmp_path / "run" / "checkpoints")[-1]
    lines = len((tmp_path / "run" / "history.csv").read_text().splitlines())
    step, iteration = map(int, last.name.removeprefix("step-").split("-refined-"))
    assert lines == 1 + step + iteration == 1 + count
    code, _, err = command(**changes, resume="")
    assert code == 0, err
    same(tmp_path / "run", tmp_path / "whole")


def test_a_signal_during_the_refinement_keeps_what_is_refined(command, tmp_path, monkeypatch, same):
    changes = {"method": "r", "refine_epochs": 7}
    assert command(**changes, output_dir=tmp_path / "whole")[0] == 0
    add = Slopes.add

    def signalled(slopes, *arguments):
        add(slopes, *arguments)
        if slopes.visits.sum() == 10:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Slopes, "add", signalled)
        assert command(**changes)[0] == 128 + signal.SIGTERM
    assert found(tmp_path / "run" / "checkpoints")[-1].name.endswith("-refined-3")
    assert command(**changes, resume="")[0] == 0
    same(tmp_path / "run", tmp_path / "whole")


def test_resume_begins_what_has_not_begun_and_leaves_what_is_finished(command, tmp_path):
    assert command(resume="")[0] == 0
    before = (tmp_path / "run" / "metrics.json").stat().st_mtime_ns
    code, out, err = command(resume="")
    assert code == 0
    assert "is finished already" in err
    assert "score" in out
    assert (tmp_path / "run" / "metrics.json").stat().st_mtime_ns == before


def test_resume_does_not_replace_what_it_cannot_go_on_with(command, tmp_path, killed_after):
    with killed_after(2):
        command(restarts=2)
    code, _, err = command(resume="")  # without --restarts
    assert code == 2
    assert "already holds a run (restart-0)" in err
    assert found(tmp_path / "run" / "restart-0" / "checkpoints")


def test_a_run_goes_on_by_its_own_configuration(stopped, whole, same):
    run = stopped()
    words = ["--config", str(run / "config.yaml"), "--output_dir", str(run), "--resume"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["finetune", *words]) == 0
    same(run, whole)


def test_restarts_go_on_with_the_one_that_was_stopped(command, tmp_path, killed_after, same):
    assert command(restarts=2, output_dir=tmp_path / "whole")[0] == 0
    with killed_after(5):  # the first has four
        command(restarts=2)
    assert command(restarts=2, resume="")[0] == 0
    for k in range(2):
        same(tmp_path / "run" / f"restart-{k}", tmp_path / "whole" / f"restart-{k}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("moment", "step"), [("before", 13), ("while", 14)])
def test_a_signal_writes_a_checkpoint_and_says_so(
    command, whole, tmp_path, monkeypatch, number, same, moment, step
):
    """Before the processes ask each other for signals, or while they do: then a step later."""
    due, most, steps = checkpoint.Keeper.due, processes.most, []

    def asked(keeper, step):
        steps.append(step)
        if step == 13 and moment == "before":
            signal.raise_signal(number)
        return due(keeper, step)

    def exchanged(*values):
        found = most(*values)
        if steps[-1] == 13 and moment == "while":
            signal.raise_signal(number)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Keeper, "due", asked)
        patch.setattr(processes, "most", exchanged)
        code, _, err = command()
    assert code == 128 + number
    assert f"by {number.name}" in err
    assert "--resume" in err
    assert found(tmp_path / "run" / "checkpoints")[-1].name == f"step-{step}"
    assert command(resume="")[0] == 0
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_results_are_written_keeps_the_training(
    command, whole, tmp_path, monkeypatch, number, same
):
    def signalled(*arguments):
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(results, "sample_posterior", signalled)
        code, _, err = command()
    assert code == 128 + number
    assert f"by {number.name}" in err
    assert "--resume" in err
    history = tmp_path / "run" / "history.csv"
    trained = history.read_bytes()
    assert command(resume="")[0] == 0
    assert history.read_bytes() == trained  # no step is done again
    same(tmp_path / "run", whole)


def test_a_cell_of_a_comparison_goes_on(small_run, few_draws, tmp_path, killed_after, same):
    small = small_run | {"rank": 3, "batch_size": 20, "draws": 2}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    cells.train_cell("r", words, tmp_path / "whole")
    with killed_after(2):
        cells.train_cell("r", words, tmp_path / "cell")
    before = (tmp_path / "cell" / "config.yaml").stat().st_mtime_ns
    cells.train_cell("r", words, tmp_path / "cell")
    assert (tmp_path / "cell" / "config.yaml").stat().st_mtime_ns == before  # not begun anew
    same(tmp_path / "cell", tmp_path / "whole")
