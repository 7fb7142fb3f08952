r"""Bytes that autograd keeps between the forward and the backward pass: counted, and measured.

Autograd saves tensors; many are views of the same memory, or of parameters, which are there anyway.
So storages are counted, each once, but for those that were there before. What needs no values needs
no memory: a network of fake tensors, which have shape, type and device and nothing else, is counted
like a real one. A block that is computed again (gradient checkpointing) saves its inputs only, and
during the backward pass, one block after the other, what it saves without.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bayes_lora.inference.cells import peak_memory
from bayes_lora.inference.quiet import quiet
from bayes_lora.layers import AdaptedLinear
from bayes_lora.models.likelihoods import Classification, LanguageModel
from bayes_lora.network import AdaptedNetwork, Latents

RANK = 8
VALUES = {"open": None, "decided": 1.0, "undecided": 0.5}
Build = Callable[..., nn.Module]
"""Makes a backbone; keywords change its configuration."""


class Setting(NamedTuple):
    """How a step is made.

    Attributes
    ----------
    gates : str
        `open`: none takes part. `decided`: all are at 1, one level counts. `undecided`: all are
        at 1/2, every level counts and gets a gradient.
    bf16 : bool
        Autocast to bfloat16.
    again : bool
        Gradient checkpointing.
    """

    gates: str
    bf16: bool = False
    again: bool = False

    def __str__(self) -> str:
        return f"{self.gates} {'bf16' if self.bf16 else 'fp32'}{' again' if self.again else ''}"


SETTINGS = [Setting(*each) for each in product(VALUES, (False, True), (False, True))]


@contextmanager
def saved_storages(given: Iterable[Tensor]) -> Iterator[list[torch.UntypedStorage]]:
    """Collect the storages that autograd saves inside the block.

    Parameters
    ----------
    given : iterable of Tensor
        Parameters, buffers and inputs: what is in memory without any pass.

    Yields
    ------
    list of UntypedStorage
        Every storage once, in the order of the pass. Ask them for their bytes when the pass is
        over: FSDP empties the storages of weights that it has gathered.

    Examples
    --------
    >>> x = torch.ones(3, requires_grad=True)
    >>> with saved_storages([x]) as found:
    ...     y = x.exp().view(1, 3).sum() + x.square().sum()  # exp saves its result, square x
    >>> [storage.nbytes() for storage in found]
    [12]
    """
    known = {tensor.untyped_storage()._cdata for tensor in given}
    found: list[torch.UntypedStorage] = []

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            found.append(storage)  # held, so that no other takes its address
        return tensor.detach()  # an output saved as it is would hold itself for ever

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield found


def adapted(build: Build, again: bool = False, **changes: int) -> AdaptedNetwork:
    """An adapted network as in training, with ranges of some size."""
    network = AdaptedNetwork(build(**changes), rank=RANK).train()
    for name, buffer in network.named_buffers():
        if name.endswith("_limits"):
            buffer.fill_(1.0)
    if again:
        network.gradient_checkpointing_enable()
    return network


def forward(
    network: AdaptedNetwork,
    shape: tuple[int, int],
    setting: Setting,
    mode: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, int]:
    """Log likelihood of a batch, and the bytes that autograd keeps for its gradient.

    Parameters
    ----------
    network : AdaptedNetwork
        Real, or of fake tensors; checkpointing is its own matter.
    shape : tuple of two int
        Texts, and tokens of each.
    setting : Setting
        Gates and type.
    mode : FakeTensorMode, optional
        That of a network of fake tensors.
    """
    mode = mode or nullcontext()
    with mode:
        weights = torch.zeros(network.num_adapter_weights, requires_grad=True)
        ids = torch.ones(shape, dtype=torch.long)
        likelihood, labels = Classification(), torch.zeros(shape[0], dtype=torch.long)
        if network.backbone.get_output_embeddings() is not None:
            likelihood, labels = LanguageModel(), ids
    value, both = VALUES[setting.gates], (network.rank_gate_shape, network.bit_gate_shape)
    own = [] if value is None else [torch.full(s, value, requires_grad=value < 1) for s in both]
    # of real gates, as they are asked which levels count
    mixtures = network._mixtures(own[1], every_level=False) if own else []
    given = [*network.parameters(), *network.buffers(), weights, ids, labels]
    with (
        mode,
        mock.patch.object(network, "_mixtures", return_value=mixtures),
        # nothing may depend on the values of a fake one: ranges are set, and no texts are packed
        mock.patch.object(AdaptedLinear, "_on_host", return_value=(1.0,) * len(network.bits)),
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None),
        torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16),
        saved_storages(given) as found,
    ):
        output = network({"input_ids": ids}, Latents(weights, *own))
        log_likelihood = likelihood(output).log_prob(labels).sum()
    return log_likelihood, sum(storage.nbytes() for storage in found)


def counted(build: Build, shape: tuple[int, int], setting: Setting) -> int:
    """Bytes of activations, without any memory; of those computed again, of one block too."""

    def count(again: bool = False, **changes: int) -> int:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            network = adapted(build, again, **changes)
        return forward(network, shape, setting, mode)[1]

    if not setting.again:
        return count()
    return count(again=True) + count(num_hidden_layers=2) - count(num_hidden_layers=1)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measured(build: Build, shape: tuple[int, int], setting: Setting) -> tuple[int, int]:
    """Bytes by which memory grows in a forward pass, and at most in a step; in a new process."""
    quiet()
    torch.set_num_threads(1)
    network = adapted(build, setting.again)
    forward(network, (2, 8), setting)[0].backward()  # loads what is loaded once
    before = resident()
    log_likelihood, _ = forward(network, shape, setting)
    grown = resident() - before
    log_likelihood.backward()
    return grown, peak_memory() - before
