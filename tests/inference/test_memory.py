"""Memory does not grow with the number of steps."""

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyro
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from bayes_lora.inference.optimisation import Optimisation
from bayes_lora.inference.phases import Phase
from bayes_lora.inference.train import fit
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork

WARM, STEPS = 1200, 2000  # the allocator takes some hundreds of steps to come to rest
PAGE = 4096
LEAST = 1000  # bytes a step that would be seen: what the allocator does is less


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def tensors():
    """How many there are."""
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def measured():
    """Tensors and resident memory before and after the steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40,
    )  # fmt: skip
    backbone = BertForSequenceClassification(config)
    network = AdaptedNetwork(backbone, rank=2, target_modules=".*query")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (64, 7), generator=generator)
    examples = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2}
        for row in ids
    ]
    loader = DataLoader(examples, 8, shuffle=True, generator=generator)
    with pyro.settings.context(module_local_params=True):
        model = BayesianLoRA(network, Classification(), Priors(), num_examples=64)
        guide = GateGuide(model, network.initial_adapter_weights(generator), normal_weights=True)
        steps, seen = [0], []

        def look(_record):
            steps[0] += 1
            if steps[0] in (WARM, WARM + STEPS):
                seen.append((tensors(), resident()))

        phases = [Phase("joint", "sampled", WARM + STEPS)]
        fit(model, guide, loader, phases, Optimisation(1e-3, 0.01), Accelerator(cpu=True), look)
    return seen


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_over_two_thousand_steps():
    """In a process of its own: what others have left in pieces would be filled first, or not."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        before, after = pool.submit(measured).result()
    assert before[0] == after[0]
    assert after[1] - before[1] <= STEPS * LEAST
