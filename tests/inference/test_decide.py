"""Runs that are read back, and decisions made anew, on a tiny model."""

import json

import pytest
import torch

from bayes_lora.costs import totals
from bayes_lora.gates import nested
from bayes_lora.inference.bundle import read_bundle, write_bundle
from bayes_lora.inference.cli import main
from bayes_lora.inference.decide import evidence, judge
from bayes_lora.inference.decision import read_decision
from bayes_lora.inference.trained import read_run


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
    judged = judge(found, found.gates)
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
    assert judge(found, found.gates)["nll"] == pytest.approx(metrics["nll"], abs=1e-6)


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
    assert "with every gate closed" in capsys.readouterr().err
    assert json.loads((folder / "decision.json").read_text()) == content
    assert main(["decide", str(folder)]) == 0
    assert read_run(folder).gates.rank_gate.equal(start.gates.rank_gate)


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


def test_a_posterior_that_the_data_left_alone_is_worth_nothing(run):
    """Also where a price couples the gates."""
    found = read_run(run())
    with torch.no_grad():
        for _ in range(200):  # to the point where every gate is as it would be without data
            now = found.model.logits_without_data(found.guide.open_probabilities())
            for parameter, logits in zip(
                (found.guide.rank_logits, found.guide.bit_logits), now, strict=True
            ):
                parameter.copy_(logits)
    stats = read_bundle(found.folder / "posterior.nc")
    for name, logits in zip(("rank", "bit"), now, strict=True):
        stats.sample_stats[f"{name}_without_data"][0] = logits.sigmoid().numpy()
    write_bundle(found.folder / "posterior.nc", stats)
    rank, bits = evidence(found)
    torch.testing.assert_close(rank, torch.zeros(12, 3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(bits, torch.zeros(12, 6, 3).double(), atol=1e-4, rtol=0)


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
