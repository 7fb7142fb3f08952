"""The model card of an export: what it is, what was decided for every layer, how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bayes_lora.inference.manifest import Manifest
from bayes_lora.inference.table import short_names
from bayes_lora.layers import TENSORS
from bayes_lora.targets import LayerSpec

CARD = """---
{front}
---

# {title}

{name} fine-tuned on {task} by [Bayesian LoRA](https://arxiv.org/abs/2406.13046) (bayes-lora
{version}): rank and bits of every layer were inferred together with the weights of the adapters.

{use}

## Measured on the validation set, as trained

{metrics}

## Decided rank and bits

By the rule: {by}. Tensors at 32 bits are not quantized.

{layers}
"""

SHOWN = {
    "score": "score", "nll": "NLL, nats", "ece": "expected calibration error",
    "relative_bops_32": "bit operations relative to 32 x 32 bits",
    "relative_bops_16": "bit operations relative to 16 x 16 bits",
    "adapter_bytes": "bytes of the adapters",
}  # fmt: skip


def model_card(manifest: Manifest, metrics: Mapping[str, float], use: str, by: str) -> str:
    """Write the card, in Markdown with the front matter that the hub reads.

    Parameters
    ----------
    manifest : Manifest
        Of the export.
    metrics : mapping of str to float
        Of the decision, on the validation set.
    use : str
        How to load it, in Markdown.
    by : str
        The rule that decided.
    """
    name, task = manifest.backbone, manifest.task.name
    front = [
        f"library_name: {'peft' if manifest.form == 'peft' else 'transformers'}",
        "pipeline_tag: text-classification",
        "tags: [bayes-lora, lora, quantization]",
    ]
    if Path(name).is_dir():  # a folder means nothing to others
        name = Path(name).name
    else:
        front.append(f"base_model: {name}")
    numbers = ["| | |", "|---|---|"]
    numbers += [f"| {text} | {metrics[key]:.4g} |" for key, text in SHOWN.items() if key in metrics]
    layers = manifest.layers
    specs = [LayerSpec(path, layer["in"], layer["out"]) for path, layer in layers.items()]
    rows = [f"| layer | rank | {' | '.join(TENSORS)} |", "|---" * (len(TENSORS) + 2) + "|"]
    for short, layer in zip(short_names(specs), layers.values(), strict=True):
        cells = [short, layer["rank"], *(layer["bits"][tensor] for tensor in TENSORS)]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return CARD.format(
        front="\n".join(front), title=f"{name}, {task}, {manifest.form}", name=name, task=task,
        version=version("bayes-lora"), use=use, metrics="\n".join(numbers), by=by,
        layers="\n".join(rows),
    )  # fmt: skip
