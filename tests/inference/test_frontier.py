"""The frontier on a tiny model: runs at several prices, kept, tabulated and drawn."""

import pandas as pd
import pytest

from bayes_lora.inference.cli import main
from bayes_lora.inference.frontier import plot_frontier


@pytest.fixture
def run_frontier(small_run, tmp_path, capsys, few_draws, cells_here):
    """Run `bayes-lora frontier`; returns exit code and outputs."""

    def run(*words):
        options = small_run | {"rank": 3, "batch_size": 20, "draws": 2, "epochs": 10}
        arguments = [f for name, value in options.items() for f in (f"--{name}", str(value))]
        code = main(["frontier", *words, "--output_dir", str(tmp_path / "out"), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.mark.slow
def test_one_run_a_price_is_trained_once(run_frontier, tmp_path):
    code, out, err = run_frontier("--prices", "30000", "0", "--gate_learning_rate", "0.5")
    assert code == 0, err
    runs = pd.read_csv(tmp_path / "out" / "frontier.csv")
    assert runs["price"].tolist() == [0, 30000]
    assert runs["relative_bops_32"][1] < runs["relative_bops_32"][0]
    assert "30000" in out
    kept = tmp_path / "out" / "price-0" / "seed-0" / "history.csv"
    before = kept.stat().st_mtime_ns
    assert run_frontier("--prices", "0", "--gate_learning_rate", "0.5")[0] == 0
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "lora"], "needs gates"),
        (["--prices", "-1"], "price is -1"),
        (["--target_bops", "0.1"], "give --prices"),
        (["--price=3"], "give --prices"),
        (["--seed", "7"], "give --seeds"),
        (["--resume"], "leave --resume out"),
        (["--prices", "cheap"], "invalid float value"),
    ],
)
def test_errors_are_one_line_before_anything_is_trained(words, said, run_frontier, tmp_path):
    code, _, err = run_frontier(*words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_picture_has_a_point_a_price_and_bars_over_seeds():
    runs = pd.DataFrame(
        {
            "price": [100.0, 100.0, 1000.0, 1000.0],
            "seed": [0, 1, 0, 1],
            "score": [0.9, 0.8, 0.7, 0.6],
            "relative_bops_32": [0.2, 0.1, 0.05, 0.05],
        }
    )
    axis = plot_frontier(runs).axes[0]
    x, y = axis.lines[0].get_data()
    assert x.tolist() == pytest.approx([15, 5])
    assert y.tolist() == pytest.approx([0.85, 0.65])
    assert {text.get_text() for text in axis.texts} >= {"100", "1000"}
