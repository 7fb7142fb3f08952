"""Runs that are read back, and decisions made anew, on a tiny model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bayes_lora.costs import totals
from bayes_lora.gates import nested
from bayes_lora.inference.cli import main
from bayes_lora.inference.decide import judge
from bayes_lora.inference.decision import read_decision
from bayes_lora.inference.trained import read_run, validation


@pytest.fixture
def run(command, tmp_path):
    """Folder of a run whose gates are half decided."""

    def make(**changes):
        code, _, err = command(price=3, gate_learning_rate=0.02, **changes)
        assert code == 0, err
        return tmp_path / "run"

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "r", "rank_structure": "independent"},
        {"method": "q", "quantized_tensors": "weight input"},
        {"method": "lora", "weight_posterior": "normal"},
    ],
    ids=["qr", "r", "q", "normal"],
)
def test_a_run_that_is_read_back_predicts_as_it_did(run, changes):
    folder = run(**changes)
    found = read_run(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    judged = judge(found, found.gates, validation(found))
    for name in ("score", "nll", "ece"):
        assert judged[name] == pytest.approx(metrics[name], abs=1e-6)
    structure = found.model.network.structure
    for order, gate, decided in zip(
        (structure, nested), found.gates, found.guide.decision(), strict=True
    ):
        assert (gate is None) == (decided is None)
        if gate is not None:
            assert torch.equal(order(gate), order(decided))


def test_a_regression_is_read_back_with_its_scale(run, inputs):
    files = {f"{split}_file": inputs / f"{split}_scores.jsonl" for split in ("train", "validation")}
    folder = run(**files, label_column="label")
    metrics = json.loads((folder / "metrics.json").read_text())
    found = read_run(folder)
    assert judge(found, found.gates, validation(found))["nll"] == pytest.approx(
        metrics["nll"], abs=1e-6
    )


def test_classes_of_ones_own_have_their_names(run, inputs, tmp_path):
    rows = [json.loads(line) for line in (inputs / "train.jsonl").open()]
    for row in rows:
        row["label"] = ("bad", "good")[row["label"]]
    file = tmp_path / "named.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_run(run(train_file=file, validation_file=file))
    assert found.task.label_names == ("bad", "good")


def test_tighter_budgets_use_less_and_the_last_one_is_refused(run, capsys):
    folder = run()
    start = read_run(folder)
    first = totals(start.model.network, *start.gates)["relative_bops_32"]
    used = [first]
    for share in (0.9, 0.7, 0.5):
        assert main(["decide", str(folder), "--max_bops", str(share * first)]) == 0
        printed = capsys.readouterr().out
        found = read_run(folder)
        used.append(totals(found.model.network, *found.gates)["relative_bops_32"])
        assert used[-1] <= share * first * (1 + 1e-6)
        assert f"{used[-1]:.5g}" in printed
        assert " -> " in printed
    assert used == sorted(used, reverse=True)
    content = json.loads((folder / "decision.json").read_text())
    assert content["relative_bops_32"] == pytest.approx(used[-1])
    assert content["by"].startswith("max_bops")
    assert main(["decide", str(folder), "--max_bops", "1e-5"]) == 2
    assert "a budget of 1e-05 cannot be met: with every gate closed" in capsys.readouterr().err
    assert json.loads((folder / "decision.json").read_text()) == content
    assert main(["decide", str(folder)]) == 0
    assert read_run(folder).gates.rank_gate.equal(start.gates.rank_gate)


@pytest.mark.parametrize("kind", ["max_bops", "max_bytes"])
def test_what_a_decision_is_said_to_cost_is_a_budget_for_it(run, capsys, kind):
    folder = run()
    name = {"max_bops": "relative_bops_32", "max_bytes": "adapter_bytes"}[kind]
    found = read_run(folder)
    own = totals(found.model.network, *found.guide.decision())[name]
    assert main(["decide", str(folder), f"--{kind}", repr(own)]) == 0
    capsys.readouterr()
    assert read_run(folder).gates.rank_gate.equal(found.gates.rank_gate)
    assert read_run(folder).gates.bit_gate.equal(found.gates.bit_gate)
    if kind == "max_bops":  # of bytes nothing is left with every gate closed
        assert main(["decide", str(folder), f"--{kind}", "1e-6"]) == 2
        least = capsys.readouterr().err.rsplit(" are left", 1)[0].rsplit(" ", 1)[1]
        assert main(["decide", str(folder), f"--{kind}", least]) == 0
        closed = totals(found.model.network, *read_run(folder).gates)[name]
        assert closed <= float(least) < 1.002 * closed


def test_priors_that_are_not_those_of_the_page_have_no_budget(run, capsys):
    folder = run()
    path = folder / "head.safetensors"
    state = load_file(path)
    state["rank_prior_logits"] -= 1.0
    save_file(state, path)
    assert main(["decide", str(folder), "--max_bops", "0.03"]) == 2
    assert "was trained with other priors" in capsys.readouterr().err
    assert main(["decide", str(folder), "--min_probability", "0.8"]) == 0


def test_data_with_other_classes_are_not_judged_by(run, inputs, tmp_path, capsys):
    rows = [json.loads(line) for line in (inputs / "train.jsonl").open()]
    for row in rows:
        row["label"] = ("bad", "good")[row["label"]]
    file = tmp_path / "named.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(train_file=file, validation_file=file)
    with file.open("a") as more:
        more.write(json.dumps(rows[0] | {"label": "awful"}) + "\n")
    assert main(["decide", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "the classes of the data are awful, bad, good now" in printed.err
    assert "score" not in printed.out


def test_a_budget_of_bytes_and_a_probability(run, capsys):
    folder = run()
    found = read_run(folder)
    size = totals(found.model.network, *found.gates)["adapter_bytes"]
    assert main(["decide", str(folder), "--max_bytes", str(size / 2)]) == 0
    found = read_run(folder)
    assert totals(found.model.network, *found.gates)["adapter_bytes"] <= size / 2
    assert main(["decide", str(folder), "--min_probability", "0.8"]) == 0
    sure = read_run(folder).gates
    rank, bits = found.guide.open_probabilities()
    assert torch.equal(sure.rank_gate.cumprod(-1), (rank.cumprod(-1) > 0.8).float())
    assert torch.equal(sure.bit_gate, (bits.cumprod(-1) > 0.8).float())


def test_a_decision_that_is_not_of_the_network(run, tmp_path):
    found = read_run(run())
    path = tmp_path / "run" / "decision.json"
    content = json.loads(path.read_text())
    content["layers"].popitem()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot read the decision"):
        read_decision(path, found.model.network)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_bops", "0"], "max_bops is 0"),
        (["--max_bops", "1.5"], "max_bops is 1.5"),
        (["--max_bytes", "-3"], "max_bytes is -3"),
        (["--min_probability", "0.3"], "min_probability is 0.3"),
        (["--max_bops", "0.1", "--max_bytes", "9"], "not allowed with argument"),
        ([], "is not the folder of a finished run"),
    ],
)
def test_wrong_input_is_one_line(words, said, tmp_path, capsys):
    assert main(["decide", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_damaged_decision_is_written_anew_where_one_is_decided_and_nowhere_else(run, capsys):
    folder = run()
    path = folder / "decision.json"
    path.write_text(path.read_text()[:60])
    assert main(["export", str(folder), "--format", "packed", "--to", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert f"`bayes-lora decide {folder}` writes it anew" in error
    assert error.count("\n") == 1
    assert main(["decide", str(folder)]) == 0
    assert "decision.json" in capsys.readouterr().err
    found = read_run(folder)
    assert all(map(torch.equal, found.gates, found.guide.decision()))


@pytest.mark.parametrize("broken", ["guide.safetensors", "head.safetensors", "task.json"])
def test_a_damaged_run_is_refused_by_name(run, capsys, broken):
    folder = run()
    (folder / broken).write_bytes((folder / broken).read_bytes()[:40])
    assert main(["decide", str(folder)]) == 2
    error = capsys.readouterr().err
    assert broken in error
    assert error.count("\n") == 1


def test_restarts_are_named(run, capsys):
    folder = run(restarts=2)
    assert main(["decide", str(folder)]) == 2
    assert "restart-0" in capsys.readouterr().err
    assert main(["decide", str(folder / "restart-1")]) == 0


def test_a_run_without_gates_has_nothing_to_decide(run, capsys):
    assert main(["decide", str(run(method="lora"))]) == 2
    assert "no gates to decide" in capsys.readouterr().err


def test_without_the_data_it_is_decided_but_not_measured(run, tmp_path, inputs, capsys):
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes((inputs / "validation.jsonl").read_bytes())
    folder = run(validation_file=mine)
    mine.unlink()
    assert main(["decide", str(folder), "--min_probability", "0.7"]) == 0
    printed = capsys.readouterr()
    assert "nothing is measured, without data" in printed.err
    assert "score" not in printed.out
    assert json.loads((folder / "decision.json").read_text())["by"] == "min_probability 0.7"


def test_a_price_of_any_size_leaves_a_finite_worth(run, capsys):
    """Where bit operations cost thousands of nats a gate."""
    folder = run()
    found = read_run(folder)
    share = totals(found.model.network, *found.gates)["relative_bops_32"]
    path = folder / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"price": 3e6}))
    capsys.readouterr()
    assert main(["decide", str(folder), "--max_bops", str(0.8 * share)]) == 0
    assert "nan" not in capsys.readouterr().out
    after = read_run(folder)
    used = totals(after.model.network, *after.gates)["relative_bops_32"]
    assert 0.5 * share < used <= 0.8 * share


def test_a_decision_that_is_worse_than_none_is_told(run, capsys):
    """Adapters that do harm, as they may where a budget leaves too little of them."""
    folder = run()
    state = load_file(folder / "guide.safetensors")
    save_file(state | {"loc": 40 * state["loc"]}, folder / "guide.safetensors")
    assert main(["decide", str(folder), "--max_bops", "0.5"]) == 0
    printed = capsys.readouterr()
    assert "with every gate closed NLL is" in printed.err
    after = next(row for row in printed.out.splitlines() if row.startswith("nll")).split()[-1]
    assert float(printed.err.split("NLL is ")[1].split(",")[0]) < float(after)
    assert main(["decide", str(folder)]) == 0  # of no budget it is not asked
    assert "every gate closed" not in capsys.readouterr().err
