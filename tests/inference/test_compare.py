"""The comparison on a tiny model: cells, choice of a rate, resumption, tables."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bayes_lora.errors import NumericalError
from bayes_lora.inference import cells, compare
from bayes_lora.inference.comparison import Cell, collect, markdown, plot_comparison, table


@pytest.mark.slow
def test_every_method_fills_its_cell(run_compare, tmp_path):
    words = ["--tasks", "custom", "--seeds", "3", "--learning_rates", "1e-3"]
    methods = [name for name in compare.METHODS if name != "adalora_published"]
    code, out, err = run_compare(*words, "--methods", *methods)
    assert code == 0, err
    cells = pd.read_csv(tmp_path / "out" / "comparison.csv").set_index("method")
    assert set(cells.index) == set(methods)
    assert cells[["score", "nll", "ece", "seconds", "peak_memory_mb"]].notna().all().all()
    shares = cells["relative_bops_32"]
    assert shares["lora_8bit"] == pytest.approx(1 / 16)
    assert shares["lora_4bit"] == pytest.approx(1 / 64)
    assert shares["full"] < shares["lora_svd"] <= shares["lora"] < 1.001
    assert cells["mean_rank"]["adalora"] == 3
    for method in ("adalora", "lora_svd"):
        ranks = json.loads((tmp_path / f"out/custom/{method}/seed-3/ranks.json").read_text())
        assert np.mean(list(ranks.values())) == cells["mean_rank"][method]
        assert len(ranks) == 12
    # no larger than qr, and no component more would fit
    folder = tmp_path / "out" / "custom"
    size = json.loads((folder / "qr" / "seed-3" / "metrics.json").read_text())
    assert cells["mean_rank"]["lora_svd"] * 12 * 32 <= size["adapter_parameters"]
    assert all(method in out for method in methods)


@pytest.mark.slow
def test_the_rate_is_chosen_without_the_validation_set_and_cells_are_kept(
    run_compare, tmp_path, monkeypatch
):
    words = ["--tasks", "custom", "--methods", "lora", "--seeds", "0", "1"]
    trials = []
    train = cells.train_cell

    def spy(method, given, folder):
        trials.append(folder.name)
        assert ("--holdout_share" in given) == folder.name.startswith("rate")
        train(method, given, folder)

    monkeypatch.setattr(cells, "train_cell", spy)
    code, _, err = run_compare(*words, "--learning_rates", "1e-3", "1e-5", max_train_examples=60)
    assert code == 0, err
    assert trials == ["rate-0.001", "rate-1e-05", "seed-0", "seed-1"]
    folder = tmp_path / "out" / "custom" / "lora"
    found = {
        rate: json.loads((folder / f"rate-{rate:g}" / "metrics.json").read_text())
        for rate in (1e-3, 1e-5)
    }
    best = max(found, key=lambda rate: (found[rate]["score"], -found[rate]["nll"]))
    listed = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert listed["learning_rate"].tolist() == [best, best]
    (folder / "seed-1" / "metrics.json").unlink()
    run_compare(*words, "--learning_rates", "1e-3", "1e-5", max_train_examples=60)
    assert trials[4:] == ["seed-1"]
    again = pd.read_csv(tmp_path / "out" / "comparison.csv")
    same = ["score", "nll", "ece"]
    pd.testing.assert_frame_equal(listed[same], again[same])
    # the same cell with other options is no longer that cell
    code, _, err = run_compare(*words, "--learning_rates", "1e-3", "1e-5", max_train_examples=50)
    assert code == 2
    assert "was trained with other options" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "lora"], "--tasks"),
        (["--tasks", "nosuch"], "a named task"),
        (["--tasks", "custom", "--seeds", "0", "-1"], "seed is -1"),
        (["--tasks", "custom", "--learning_rates", "1e-3", "-2"], "learning_rate is -2"),
        (["--tasks", "custom", "--seeds", "0", "0"], "--seeds names 0 more than once"),
        (["--tasks", "custom", "--methods", "qr", "qr"], "--methods names qr more than once"),
        (["--tasks", "custom", "--learning_rate", "1"], "give --learning_rates"),
        (["--tasks", "custom", "--seed=7"], "give --seeds"),
        (["--tasks", "custom", "--resume"], "leave --resume out"),
        (["--tasks", "custom", "--methods", "qrs"], "invalid choice: 'qrs'"),
        (["--tasks", "custom", "--methods", "lora_svd", "qr"], "name both"),
        (["--tasks", "custom", "--price", "-1"], "price is -1"),
        (["--tasks", "agreement", "--methods", "adalora_published"], "no settings for agreement"),
        (["--tasks", "custom", "--prize", "1"], "unrecognized arguments: --prize"),
    ],
)
def test_errors_are_one_line_before_anything_is_trained(words, said, run_compare, tmp_path):
    code, _, err = run_compare(*words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_there_are_an_error_before_anything_is_trained(run_compare, tmp_path):
    code, _, err = run_compare("--tasks", "custom", train_file="nowhere.jsonl")
    assert code == 2
    assert "nowhere.jsonl" in err
    assert not (tmp_path / "out").exists()


def cells_of(**scores):
    return collect(
        [
            Cell(task, method, seed, {"score": score, "relative_bops_32": share})
            for (method, share), (task, values) in (
                ((m, 1.0 if m == "lora" else 0.05), item)
                for m, tasks in scores.items()
                for item in tasks.items()
            )
            for seed, score in enumerate(values)
        ]
    )


def test_the_table_has_means_deviations_and_a_paired_test():
    lora, ours = [0.80, 0.81, 0.85], [0.79, 0.83, 0.86]
    rows = table(cells_of(lora={"a": lora}, qr={"a": ours})).set_index("method")
    assert rows["score"]["qr"] == f"{np.mean(ours):.3f} ± {np.std(ours, ddof=1):.3f}"
    assert rows["p"]["qr"] == f"{stats.ttest_rel(ours, lora).pvalue:.2g}"
    assert rows["p"]["lora"] == rows["NLL, nats"]["qr"] == ""
    assert rows["BOPs of 32 x 32"]["qr"] == "5.0% ± 0.0%"
    assert (
        markdown(table(cells_of(lora={"a": [0.5]})))
        .splitlines()[2]
        .startswith("| a | lora | 0.500")
    )


def test_the_mean_over_tasks_is_of_methods_that_have_all():
    rows = table(cells_of(lora={"a": [0.8, 0.9], "b": [0.4, 0.6]}, qr={"a": [0.7, 0.7]}))
    means = rows[rows["task"] == "mean"].set_index("method")["score"]
    assert means.to_dict() == {"lora": f"0.675 ± {np.std([0.6, 0.75], ddof=1):.3f}"}


def test_the_mean_over_tasks_is_of_seeds_that_have_all():
    rows = table(
        cells_of(lora={"a": [0.80, 0.90], "b": [0.40, 0.60]}, qr={"a": [0.7, 0.9], "b": [0.2]})
    )
    means = rows[rows["task"] == "mean"].set_index("method")
    assert means["score"].to_dict() == {
        "lora": f"0.675 ± {np.std([0.6, 0.75], ddof=1):.3f}",
        "qr": "0.450",
    }
    assert means["p"].to_dict() == {"lora": "", "qr": ""}  # one pair


def test_the_mean_over_tasks_is_tested_by_its_own_pairs_and_has_no_mean_of_nats():
    scores = {
        "lora": {"a": [0.80, 0.90, 0.85], "b": [0.40, 0.60, 0.55]},
        "qr": {"a": [0.82, 0.88, 0.87], "b": [0.45, 0.55, 0.60]},
    }
    found = cells_of(**scores).assign(nll=1.0, learning_rate=[1e-3, 3e-4, 1.2e-3] * 4)
    rows = table(found)
    means = rows[rows["task"] == "mean"].set_index("method")
    lora, ours = (np.mean([*scores[name].values()], axis=0) for name in ("lora", "qr"))
    assert means["p"]["qr"] == f"{stats.ttest_rel(ours, lora).pvalue:.2g}"
    assert means["NLL, nats"]["qr"] == means["rate"]["qr"] == ""
    assert rows["NLL, nats"][0] == "1.000 ± 0.000"


def test_a_trial_that_diverges_is_the_worst_and_an_edge_is_named(monkeypatch, capsys, tmp_path):
    scores = {"0.001": 0.7, "0.003": 0.8, "0.01": None}

    def trial(method, words, folder):
        score = scores[words[words.index("--learning_rate") + 1]]
        if score is None:
            raise NumericalError("step 3: loss not finite")
        return {"score": score, "nll": 1.0}

    monkeypatch.setattr(compare, "in_a_process", trial)
    assert compare.best_rate("adalora", [], tmp_path, (1e-3, 3e-3, 1e-2)) == 3e-3
    error = capsys.readouterr().err
    assert "adalora at 0.01: step 3: loss not finite" in error
    assert "edge" not in error
    assert compare.best_rate("lora", [], tmp_path, (1e-3, 3e-3)) == 3e-3
    assert "0.003, at the edge of its grid" in capsys.readouterr().err
    scores |= {"0.001": None, "0.003": None}
    with pytest.raises(NumericalError):
        compare.best_rate("lora", [], tmp_path, (1e-3, 3e-3))


def test_the_table_has_the_cells_of_other_commands_with_the_same_options(tmp_path):
    def write(place, method, words, metrics):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        seed = place.rsplit("-", 1)[1]
        options = [*words, "--task", "t", "--seed", seed, "--learning_rate", "1"]
        (folder / "cell.json").write_text(json.dumps({"method": method, "options": options}))
        (folder / "metrics.json").write_text(json.dumps(metrics))

    done = {"score": 0.5, "peak_memory_mb": 1.0}
    write("b/qr/seed-1", "qr", ["--epochs", "2"], done)
    write("b/lora/seed-10", "lora", ["--epochs", "2"], done)
    write("b/lora/seed-2", "lora", ["--epochs", "2"], done)
    write("b/lora/seed-3", "lora", ["--epochs", "9"], done)  # other options
    write("b/lora/seed-4", "lora", ["--epochs", "2"], {"score": 0.5})  # not finished
    write("b/lora/rate-1", "lora", ["--epochs", "2"], done)
    write("a/r/seed-1", "r", ["--epochs", "2"], done)
    found = compare.cells(tmp_path, ["--epochs", "2"], ["b"])
    assert [(c.task, c.method, c.seed) for c in found] == [
        ("b", "lora", 2), ("b", "lora", 10), ("b", "qr", 1), ("a", "r", 1)
    ]  # fmt: skip


def test_the_picture_has_a_panel_a_task():
    figure = plot_comparison(cells_of(lora={"a": [0.8], "b": [0.5]}, qr={"a": [0.7, 0.8]}))
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]


def test_the_memory_of_a_process_is_not_that_of_its_parent():
    large = np.ones(2**26)  # half a GB
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        child = pool.submit(cells.peak_memory).result()
    assert child < cells.peak_memory() - large.nbytes / 2
