r"""A network with adapters under FSDP, in two processes on a CPU.

    python benchmarks/fsdp.py > benchmarks/fsdp.csv

The adapters of all layers are one flat vector, a parameter of the guide, lent to layers as views.
A small Llama is trained by two processes (gloo), each with half of the texts, and compared with one
process that has all. `fully_shard` is on every block and, way by way:

    backbone    on the encoder, so on all that is frozen but the output layer; the guide is whole in
                each process
    ddp         the same, and DDP averages the guide's gradients, as `fit` has it
    bare ddp    the same, but DDP is not told what to leave alone
    bf16        as `backbone`, with weights gathered in bfloat16, without autocast
    guide       on the encoder, and on the guide
    guide kept  the same, but what the guide has gathered is kept until the backward pass
    all         on the ELBO, which has everything: flat vector, gates and moments are shared out too

`loss` and `gradient` are relative distances to one process, the largest of all that is trained.
`by_hand`: gradients that nothing averaged over the processes, so that this script did. `saved_mb`
is what autograd keeps in a process between the passes (weights that FSDP had gathered are gone by
then), beside that of `none`, where each process has all. Gates are `open`, or `held` at 0 and 1,
with every adapted weight on a grid; `again` is gradient checkpointing.

`fit` is the whole loop (calibration, gates that are drawn, that are decided) on a backbone that is
shared out, beside the same loop of two processes that have all: relative distance of all that is
trained.
"""

from __future__ import annotations

import csv
import os
import socket
import sys
from collections.abc import Iterator
from itertools import chain

import pyro
import torch
from activations import saved_storages
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, RandomSampler
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_lora.inference import processes
from bayes_lora.inference.elbo import TermwiseELBO
from bayes_lora.inference.optimisation import Optimisation
from bayes_lora.inference.phases import Phase
from bayes_lora.inference.quiet import quiet
from bayes_lora.inference.train import fit
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import LanguageModel
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork

TEXTS, TOKENS, WORDS = 8, 9, 60
WAYS = "none", "backbone", "ddp", "bare ddp", "bf16", "guide", "guide kept", "all"
Pair = tuple[BayesianLoRA, GateGuide]


def pair(again: bool) -> Pair:
    """A model of a small Llama, and its guide; the same in every process."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=176, initializer_range=0.3, use_cache=False,
    )  # fmt: skip
    network = AdaptedNetwork(LlamaForCausalLM(config), rank=3)
    if again:
        network.gradient_checkpointing_enable()
    model = BayesianLoRA(network, LanguageModel(), Priors(), num_examples=50).train()
    return model, GateGuide(model, 0.1 * torch.randn(network.num_adapter_weights))


def texts() -> Tensor:
    """Texts of random tokens."""
    return torch.randint(WORDS, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(1))


def held(network: AdaptedNetwork) -> Gates:
    """Gates of every kind, at 0 and 1."""
    draw = torch.Generator().manual_seed(2)
    shapes = network.rank_gate_shape, network.bit_gate_shape
    return Gates(*(torch.randint(2, shape, generator=draw).float() for shape in shapes))


def share_out(model: BayesianLoRA, way: str, guide: GateGuide, elbo: Module) -> Module:
    """Share out what this way says; the module to call."""
    encoder = model.network.backbone.base_model
    if way == "none":
        return elbo
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if way == "bf16" else None)
    for block in encoder.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if way == "all":
        fully_shard(elbo, mesh=mesh)
        return elbo
    fully_shard(encoder, mesh=mesh, mp_policy=policy)
    if way.startswith("guide"):
        fully_shard(guide, mesh=mesh, reshard_after_forward=way == "guide")
    if way == "ddp":
        processes.leave_shards(elbo)
    if way.endswith("ddp"):
        return DistributedDataParallel(elbo, broadcast_buffers=False, find_unused_parameters=True)
    return elbo


def step(way: str, kind: str, again: bool, alone: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and bytes saved of one step of this process; `alone` has all texts."""
    model, guide = pair(again)
    model.network.calibrate([{"input_ids": texts()}], guide.loc)
    module = share_out(model, way, guide, elbo := TermwiseELBO()(model, guide))
    half = TEXTS // 2
    mine = texts() if alone else texts()[distributed.get_rank() * half :][:half]
    gates = held(model.network) if kind == "held" else Gates()
    there = [t.to_local() if isinstance(t, DTensor) else t for t in elbo.parameters()]
    with saved_storages([*there, *elbo.buffers(), mine, *(g for g in gates if g is not None)]) as s:
        loss = module({"input_ids": mine}, mine, 1.0, gates)
    saved = sum(storage.nbytes() for storage in s)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in elbo.named_parameters() if p.requires_grad}, saved


def distance(one: Tensor, two: Tensor) -> float:
    """Relative to the second."""
    return float(torch.linalg.vector_norm(one - two) / torch.linalg.vector_norm(two))


def rows_of_steps(way: str) -> Iterator[list[str]]:
    """Rows of the table for one way: one step."""
    for kind in ("open", "held"):
        for again in (False, True):
            row = [way, kind, again * "again"]
            loss, gradients, _ = step("none", kind, again, alone=True)
            try:
                mine, found, saved = step(way, kind, again, alone=False)
            except RuntimeError as error:
                message = str(error).split("\n")[0][:90]
                yield [*row, "", "", "", "", f"fails: {message}"]
                continue
            far, by_hand = 0.0, []
            for name, gradient in gradients.items():
                if gradient is None:  # gates that are held
                    continue
                its = found[name]
                if isinstance(its, DTensor):
                    its = its.full_tensor()
                elif "ddp" not in way:
                    by_hand.append(name)
                    its = processes.mean(its)
                far = max(far, distance(its, gradient))
            numbers = (distance(processes.mean(mine), loss), far)
            yield [
                *row,
                *(f"{n:.1e}" for n in numbers),
                " ".join(by_hand),
                f"{saved / 1e6:.3f}",
                "",
            ]


def trained(shared: bool, again: bool) -> Tensor:
    """All that `fit` trains, as one vector."""
    pyro.set_rng_seed(0)
    processes.draw_apart(0)
    model, guide = pair(again)
    torch.manual_seed(11 + distributed.get_rank())
    if shared:
        share_out(model, "backbone", guide, guide)
    rows = [{"input_ids": text, "labels": text} for text in texts()]
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(3))
    phases = [
        Phase("warmup", "open", 3),
        Phase("joint", "sampled", 4),
        Phase("settle", "decided", 3),
    ]
    fit(
        model, guide, DataLoader(rows, 2, sampler=order), phases, Optimisation(0.01),
        processes.accelerator(cpu=True),
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in guide.parameters()])


def rows_of_fit() -> Iterator[list[str]]:
    """Rows of the table for whole trainings."""
    whole = trained(shared=False, again=False)
    for again in (False, True):
        far = distance(trained(shared=True, again=again), whole)
        yield ["fit", "all", again * "again", "", f"{far:.1e}", "", "", ""]


def work(index: int, port: int) -> None:
    """What each process does; the first prints the table."""
    os.environ |= {
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    quiet()
    torch.set_num_threads(1)
    pyro.settings.set(module_local_params=True)
    processes.state()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    tables = [rows_of_steps(way) for way in WAYS] + [rows_of_fit()]
    for row in chain(*tables):
        if processes.is_main():
            writer.writerow(row)
            sys.stdout.flush()
    processes.finish()


def main() -> None:
    """Print the table as CSV."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print("# python benchmarks/fsdp.py")
    columns = "way", "gates", "checkpointing", "loss", "gradient", "by_hand", "saved_mb", "outcome"
    csv.writer(sys.stdout, lineterminator="\n").writerow(columns)
    sys.stdout.flush()
    multiprocessing.spawn(work, (port,), nprocs=2)


if __name__ == "__main__":
    main()
