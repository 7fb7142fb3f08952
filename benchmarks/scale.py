r"""Memory and time of a training step of networks that may not fit here, from their shapes alone.

    python benchmarks/scale.py > benchmarks/scale.csv

Of a backbone of W parameters, P adapter weights, H of a head and G gates, T = P + H + G, a training
in float32 with AdamW keeps, in bytes,

    backbone 4 W    trained 4 T    gradients 4 T    moments 8 T    good 4 T    index 8 P    ranges

`good` are the last parameters of a finite loss; `index`, in the guide, is the component of every
weight; `ranges` are the quantizers'. Activations are counted in a forward pass of network and
likelihood on fake tensors (`activations.py`); what the backward pass makes and drops at once is not
in it. In it are `copies` of the weights: with gates, one of every adapted weight on its grid, and
under autocast one in bfloat16. Settings: `open`, `decided`, `undecided` gates; `again` for gradient
checkpointing, where one block's activations are there at a time.

Two networks that fit here also run for real: `grown` is by how much resident memory grows in the
forward pass, without the block that is there again in the backward pass; `most` is by how much at
most in a step.

Time is an estimate. The cost table has M multiply-accumulates a token, F of them by frozen weights,
which have no gradient; a step is 2 (M + F + 2 (M - F)) operations a token, with checkpointing 2 M
more, over RATE. Attention products and the output layer are left out, as in the table.

`each of 8` is a process with FSDP (`fsdp.py`): its share of the backbone, two blocks and the root
gathered, all that is trained, and the activations of a batch of its own.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from activations import RANK, SETTINGS, Build, adapted, counted, measured
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from bayes_lora.costs import macs
from bayes_lora.inference.backbone import located
from bayes_lora.inference.quiet import quiet
from bayes_lora.network import AdaptedNetwork

SHAPE, SHAPE_HERE, PROCESSES = (8, 512), (4, 256), 8  # texts and tokens of each
RATE = 150e12  # operations a second: half of what one A100 is specified for in bfloat16

DEBERTA = {
    "vocab_size": 128_100, "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
    "relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip


def deberta(**changes: int) -> nn.Module:
    """DeBERTaV3-base, a classifier."""
    return DebertaV2ForSequenceClassification(DebertaV2Config(**DEBERTA | changes))


def minilm(**changes: int) -> nn.Module:
    """The demo's backbone, a classifier."""
    config = AutoConfig.from_pretrained(located(None))
    config.update(changes)
    return BertForSequenceClassification(config)


class Llama:
    """Makes causal language models; `keys` heads of keys and values, which queries share."""

    def __init__(
        self, width: int, inner: int, blocks: int, heads: int, keys: int, words: int
    ) -> None:
        self.sizes = {
            "vocab_size": words, "hidden_size": width, "intermediate_size": inner,
            "num_hidden_layers": blocks, "num_attention_heads": heads,
            "num_key_value_heads": keys,
        }  # fmt: skip

    def __call__(self, **changes: int) -> nn.Module:
        """Make one."""
        return LlamaForCausalLM(LlamaConfig(**self.sizes | changes, use_cache=False))


NETWORKS: dict[str, Build] = {
    "DeBERTaV3-base": deberta,
    "7B": Llama(4096, 11_008, 32, 32, 32, 32_000),
    "70B": Llama(8192, 28_672, 80, 64, 8, 32_000),
}
HERE: dict[str, Build] = {"MiniLM": minilm, "small Llama": Llama(384, 1024, 6, 6, 2, 8000)}


def sizes(network: AdaptedNetwork) -> dict[str, int]:
    """Everything but activations: counts, and bytes in memory during training."""
    backbone = sum(p.numel() for p in network.backbone.parameters())
    head = sum(p.numel() for p in network.backbone.parameters() if p.requires_grad)
    frozen = sum(spec.in_features * spec.out_features for spec in network.specs)
    gates = sum(math.prod(shape) for shape in (network.rank_gate_shape, network.bit_gate_shape))
    trained = network.num_adapter_weights + head + gates
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    of_blocks, block = max(
        (
            sum(p.numel() for p in blocks.parameters()),
            sum(p.numel() for p in blocks[0].parameters()),
        )
        for blocks in lists
    )
    return {
        "parameters": backbone, "adapted layers": len(network.specs),
        "adapter parameters": network.num_adapter_weights, "head parameters": head,
        "gates": gates, "backbone": 4 * backbone, "backbone in bf16": 2 * backbone,
        "adapters": 4 * network.num_adapter_weights, "trained": 4 * trained,
        "gradients": 4 * trained, "moments": 8 * trained, "good": 4 * trained,
        "gates and their moments": 12 * gates, "index": 8 * network.num_adapter_weights,
        "ranges": sum(b.nbytes for n, b in network.named_buffers() if n.endswith("_limits")),
        "copies fp32": 4 * frozen, "copies bf16": 2 * frozen,
        "gathered": 4 * (2 * block + backbone - of_blocks),
    }  # fmt: skip


def seconds(network: AdaptedNetwork, again: bool) -> float:
    """Estimated time of a step."""
    every = float(macs(network).double().sum()) + network.frozen_macs
    frozen = sum(spec.frozen_macs for spec in network.specs) + network.frozen_macs
    operations = 2 * (every + frozen + 2 * (every - frozen)) + again * 2 * every
    return operations * math.prod(SHAPE) / RATE


def gigabytes(amount: float) -> list[str]:
    """Value and unit."""
    return [f"{amount / 1e9:.4g}", "GB"]


def rows(name: str) -> Iterator[list[str]]:
    """Rows of the table for one network."""
    with FakeTensorMode():
        network = adapted(NETWORKS[name])
    found = sizes(network)
    for quantity, amount in found.items():
        counts = quantity == "gates" or quantity.endswith(("parameters", "layers"))
        yield [name, quantity, "", *([str(amount), "1"] if counts else gigabytes(amount))]
    for again in (False, True):
        yield [name, "estimated step", again * "again", f"{seconds(network, again):.3g}", "s"]
    beside = sum(found[k] for k in ("trained", "gradients", "moments", "good", "index", "ranges"))
    one = found["backbone"] + beside
    each = found["backbone"] / PROCESSES + found["gathered"] + beside
    for setting in SETTINGS:
        activations = counted(NETWORKS[name], SHAPE, setting)
        yield [name, "activations", str(setting), *gigabytes(activations)]
        yield [name, "one process", str(setting), *gigabytes(one + activations)]
        yield [name, f"each of {PROCESSES}", str(setting), *gigabytes(each + activations)]


def rows_here(name: str) -> Iterator[list[str]]:
    """Rows of a network that runs here: counted, and measured in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    for setting in SETTINGS:
        if setting.bf16 and setting.again:  # either alone will do
            continue
        with ProcessPoolExecutor(1, spawn) as pool:
            grown, most = pool.submit(measured, HERE[name], SHAPE_HERE, setting).result()
        activations = counted(HERE[name], SHAPE_HERE, setting)
        yield [name, "activations", str(setting), *gigabytes(activations)]
        yield [name, "grown", str(setting), *gigabytes(grown)]
        yield [name, "most", str(setting), *gigabytes(most)]


def main() -> None:
    """Print the table as CSV."""
    quiet()
    # memory goes back to the system as soon as it is free, or it could not be read off
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    writer = csv.writer(sys.stdout, lineterminator="\n")
    print("# python benchmarks/scale.py")
    print(
        f"# rank {RANK}; {SHAPE[0]} texts of {SHAPE[1]} tokens, of {', '.join(HERE)} "
        f"{SHAPE_HERE[0]} of {SHAPE_HERE[1]}"
    )
    writer.writerow(["network", "quantity", "setting", "value", "unit"])
    for table, names in ((rows_here, HERE), (rows, NETWORKS)):
        for name in names:
            for row in table(name):
                writer.writerow(row)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
