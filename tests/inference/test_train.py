"""Phases, learning rates and the table, at hand-made values."""

import sys
import traceback
from pathlib import Path

import pyro
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, RandomSampler

from bayes_lora.inference.history import History
from bayes_lora.inference.optimisation import Optimisation, gate_learning_rate
from bayes_lora.inference.phases import Phase, plan
from bayes_lora.inference.table import rank_and_bits_table
from bayes_lora.inference.train import fit, record_step
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import GibbsGates, Priors
from bayes_lora.network import AdaptedNetwork


@pytest.mark.parametrize("total", [1, 7, 93, 1000])
@pytest.mark.parametrize("shares", [(0.25, 0.2, 0.25), (0.0, 0.5, 0.5), (0.33, 0.33, 0.33)])
def test_phases_add_up_and_come_in_order(total, shares):
    phases = plan(total, shares, gated=True)
    assert sum(phase.steps for phase in phases) == total
    order = ["warmup", "anneal", "joint", "settle"]
    assert [p.name for p in phases] == [n for n in order if n in {p.name for p in phases}]
    assert all(phase.steps > 0 for phase in phases)


def test_plain_lora_differs_in_nothing_but_its_gates():
    gated, plain = (plan(40, (0.25, 0.25, 0.25), gated=g) for g in (True, False))
    assert [p.name for p in gated] == [p.name for p in plain]
    for ours, theirs in zip(gated, plain, strict=True):
        assert [ours.kl_weight(s) for s in range(10)] == [theirs.kl_weight(s) for s in range(10)]
    assert [p.gates for p in plain] == ["open", "open", "open", "decided"]


def test_kl_weight_rises_in_the_anneal_and_is_one_after():
    warmup, anneal, joint, _settle = plan(40, (0.25, 0.25, 0.25), gated=True)
    assert {warmup.kl_weight(step) for step in range(10)} == {0}
    assert [anneal.kl_weight(step) for step in range(10)] == pytest.approx(
        [0.1 * (step + 1) for step in range(10)]
    )
    assert {joint.kl_weight(step) for step in range(10)} == {1}


def test_gates_can_travel_from_open_to_closed_in_the_steps_they_have():
    rates = [gate_learning_rate([Phase("joint", "sampled", steps)]) for steps in (10, 300, 3000)]
    assert rates == [0.2, 0.1, 0.01]


def test_table_shows_decision_and_its_exact_probability(network):
    rank = torch.full((12, 3), 0.9)
    rank[0] = torch.tensor([0.8, 0.1, 0.5])
    bits = torch.full((12, 6, 3), 0.7)
    bits[0, 4] = torch.tensor([0.9, 0.2, 0.5])
    decided_rank = torch.ones(12, 3)
    decided_rank[0] = torch.tensor([1.0, 0.0, 0.0])
    decided_bits = torch.zeros(12, 6, 3)
    decided_bits[0, 4, 0] = 1
    table = rank_and_bits_table(network, Gates(rank, bits), Gates(decided_rank, decided_bits))
    row = next(line for line in table.splitlines() if line.startswith("0.attention.self.query"))
    # P(rank 1) = 0.8 * 0.9, mean 0.8 + 0.08 + 0.04; P(2 bits) = 0.3; P(4 bits) = 0.9 * 0.8
    assert row.split() == [
        "0.attention.self.query",
        *("1", "72%", "0.9"),
        *("2", "30%") * 4,
        *("4", "72%"),
        *("2", "30%"),
    ]


def test_a_single_layer_keeps_the_names_of_block_and_kind(backbone):
    network = AdaptedNetwork(
        backbone(), rank=2, target_modules=r".*layer\.1\.attention.self\.query"
    )
    gates = Gates(torch.ones(1, 2))
    assert "\n1.attention.self.query " in rank_and_bits_table(network, gates, gates)


def test_the_log_likelihood_at_the_end_is_of_the_last_phase(network, tmp_path):
    model = BayesianLoRA(network, Classification(), Priors(), num_examples=10)
    guide = GateGuide(model, torch.zeros(network.num_adapter_weights))
    with History(tmp_path / "history.csv", model, guide, steps=4) as history:
        for step, phase in enumerate(("warmup", "joint", "settle", "settle")):
            terms = {"log_likelihood": -8.0 + step**2}
            history.add(record_step(step, phase, 1.0, {"loss": 0.7} | terms, {}, model))
    assert history.last(3)["log_likelihood"] == pytest.approx((-4 + 1) / 2)
    assert history.last(1)["log_likelihood"] == pytest.approx(1)


def test_the_host_waits_for_the_device_twice_a_step(network, batch, monkeypatch):
    """For which levels take part, and for the numbers of the history; no other value is read."""
    model = BayesianLoRA(network, Classification(), Priors(gates=GibbsGates()), num_examples=20)
    guide = GateGuide(model, network.initial_adapter_weights())
    examples = [
        {name: tensor[i] for name, tensor in batch.items()} | {"labels": torch.tensor(i % 2)}
        for i in range(5)
    ]
    order = RandomSampler(examples, generator=torch.Generator())
    read, to_list = [], torch.Tensor.tolist
    watched = [
        Path(sys.modules[m.__module__].__file__).parent for m in (AdaptedNetwork, fit, Priors)
    ]
    watched.append(Path(pyro.__file__).parent)

    def looked_at(by):
        """Remember who looks, if it is one of us or Pyro, and at which step."""
        callers = [Path(frame.filename) for frame in reversed(traceback.extract_stack()[:-2])]
        others = (f for f in callers if Path(torch.__file__).parent not in f.parents)
        caller = next(f for f in others if f != Path(__file__))
        if any(folder in caller.parents for folder in watched):
            read.append((len(steps), by, caller.name))

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.equal.default,
            ):
                looked_at(str(function))
            return function(*arguments, **(keywords or {}))

    def tolist(tensor):
        looked_at("tolist")
        return to_list(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    steps = []
    with Reads():
        fit(
            model, guide, DataLoader(examples, 5, sampler=order), [Phase("joint", "sampled", 3)],
            Optimisation(), Accelerator(cpu=True), steps.append,
        )  # fmt: skip
    assert [mine[1:] for mine in read if mine[0] == 1] == [
        ("tolist", "network.py"), ("tolist", "train.py")
    ]  # fmt: skip
    assert len([mine for mine in read if mine[0] == 0]) > 10  # the first step is looked at closely
