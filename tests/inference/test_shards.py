"""Backbones that FSDP has shared out, over one process here; over two in `benchmarks/fsdp.py`."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bayes_lora.inference import processes
from bayes_lora.network import AdaptedNetwork, Latents

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fsdp.py"


@pytest.fixture
def share_out(tmp_path):
    """Share a module out, in a group of one process."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["llama writes", "gpt2 writes"])
def test_calibration_gathers_the_weights(kind, share_out, backbone, batch, adapter_weights):
    whole, parts = (AdaptedNetwork(backbone(kind), rank=3).eval() for _ in range(2))
    encoder = parts.backbone.base_model
    for block in encoder.layers if kind == "llama writes" else encoder.h:
        share_out(block)  # the encoder alone would keep what it has gathered
    share_out(encoder)
    weights = adapter_weights(whole)
    gates = torch.ones(whole.rank_gate_shape), torch.ones(whole.bit_gate_shape)
    found = []
    for network in (whole, parts):
        network.calibrate([batch], weights)
        mine = weights.clone().requires_grad_()
        output = network(batch, Latents(mine, *gates))
        output.square().sum().backward()
        found.append((dict(network.named_buffers()), output.detach(), mine.grad))
    assert isinstance(next(encoder.parameters()), DTensor)
    torch.testing.assert_close(*found)


def test_ddp_leaves_alone_what_is_shared_out_and_frozen(share_out, backbone):
    network = AdaptedNetwork(backbone("llama"), rank=3)
    share_out(network.backbone.base_model)
    processes.leave_shards(network)
    left = set(network._ddp_params_and_buffers_to_ignore)
    assert left == {n for n, p in network.named_parameters() if not p.requires_grad}
    assert torch.nn.parallel.DistributedDataParallel(network).module is network


def test_what_is_trained_is_not_shared_out(share_out, backbone):
    network = AdaptedNetwork(backbone("llama"), rank=3)
    share_out(network.backbone)
    with pytest.raises(ValueError, match=r"score\.weight is trained"):
        processes.leave_shards(network)


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradient_of_one():
    done = subprocess.run(
        [sys.executable, str(BENCHMARK)], capture_output=True, text=True, check=True, timeout=600
    )
    rows = list(csv.DictReader(done.stdout.splitlines()[1:]))
    fails = {row["way"] for row in rows if row["outcome"]}
    assert fails == {"bare ddp", "bf16", "guide"}
    works = [row for row in rows if not row["outcome"]]
    assert len(works) == 5 * 4 + 2
    assert all(float(row["gradient"]) < 1e-5 for row in works)
    assert all(float(row["loss"]) < 1e-5 for row in works if row["way"] != "fit")
