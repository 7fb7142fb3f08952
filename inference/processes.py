"""Several processes that train one model: `accelerate launch -m bayes_lora.inference.finetune`.

Every process p of P has the whole model, batches b_p of its own, and its own draws of the latents.
The gradient is the mean over all, which has the likelihood scaled to N and every divergence once:

    mean_p (N / |b_p| log p(labels in b_p) - KL) = N / |b_1 + ... + b_P| log p(labels in all) - KL.

All else, as data, decision and refinement, each does alike; predictions are shared out. The main
process alone writes files. With one process nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import (
    broadcast,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    reduce,
)
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=7)
"""How long one process waits for the others: a restart of another may take days."""

Item = TypeVar("Item")


def state() -> PartialState:
    """Which process this is, of how many; the first call is where they meet."""
    # PartialState itself looks for others on processors only if it is told so
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def accelerator(mixed_precision: str = "no", cpu: bool = False) -> Accelerator:
    """What places model and batches, and has the gradients of all processes averaged."""
    # gates that are held have no gradient; buffers are alike, as all processes make them alike
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(mixed_precision=mixed_precision, cpu=cpu, kwargs_handlers=[ddp])


def is_main() -> bool:
    """Whether this process writes files and shows what is done."""
    return bool(state().is_main_process)


def wait() -> None:
    """Wait until all processes have come here."""
    state().wait_for_everyone()


def share(items: Iterable[Item]) -> Iterator[Item]:
    """Every P-th of the items, another one first in each process."""
    return islice(items, state().process_index, None, state().num_processes)


def joined(mine: list[Item]) -> list[Item]:
    """What `share` took apart, put together in the old order; all processes get all.

    Parameters
    ----------
    mine : list
        One entry for every item that this process had.
    """
    if state().num_processes == 1:
        return mine
    of_all: list[list[Item]] = gather_object([mine])
    return [part[i] for i in range(max(map(len, of_all))) for part in of_all if i < len(part)]


def of_each(mine: Item) -> list[Item]:
    """What every process has, in their order."""
    found: list[Item] = gather_object([mine])
    return found


def of_main(mine: Item) -> Item:
    """What the main process has."""
    found: list[Item] = broadcast_object_list([mine])
    return found[0]


def mean(values: Tensor) -> Tensor:
    """Mean over the processes, entry by entry; not a number if it is none in one of them."""
    found: Tensor = reduce(values, "mean")
    return found


def most(*values: float) -> list[float]:
    """The largest value of all processes, for each of these."""
    if state().num_processes == 1:
        return list(values)
    found: list[float] = reduce(torch.tensor(values, device=state().device), "max").tolist()
    return found


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Put the main process' tensors in place of all others', of the same shapes."""
    if state().num_processes > 1:
        for tensor in tensors:
            tensor.copy_(broadcast(tensor.detach().clone()))


def leave_shards(module: Module) -> None:
    """Have DDP leave alone what FSDP has shared out over the processes, as a frozen backbone.

    DDP begins with everyone's parameters put to those of the main process, and fails at parts.

    Raises
    ------
    ValueError
        If a parameter that is shared out is trained; it is named.
    """
    shards = {name: p for name, p in module.named_parameters() if hasattr(p, "full_tensor")}
    for name, parameter in shards.items():
        if parameter.requires_grad:
            raise ValueError(f"{name} is trained: share out frozen modules only")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(shards))


def draw_apart(seed: int) -> None:
    """Have every process draw other numbers from now on; the main one goes on as it was."""
    if not is_main():
        torch.manual_seed((seed + 1_000_003 * state().process_index) % 2**63)


@contextmanager
def drawing_alike() -> Iterator[None]:
    """Have all processes draw what the main one does inside the block, and after it apart again."""
    if state().num_processes == 1:
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    seed = of_main(int(torch.randint(2**62, ())))
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def finish() -> None:
    """Part from the other processes, at the end of the program."""
    state().destroy_process_group()
