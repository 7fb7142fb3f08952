"""The model card of an export: what it is, what was decided for every layer, how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bayes_lora.inference.backbone import MODELS
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

## Use

```python
{use}
```

## Measured on the validation set

{metrics}

## Decided rank and bits

By the rule: {by}. Tensors at 32 bits are not quantized. {kept}

{layers}
"""

LOAD = """import bayes_lora

bayes_lora.load("FOLDER").predict([{example}])"""
STOCK = """from transformers import {of_task}

model = {of_task}.from_pretrained({arguments})"""
PEFT = """
from peft import PeftModel

model = PeftModel.from_pretrained(model, "FOLDER")"""
KEPT = {
    "peft": "This folder has the ranks, and adapters on their grids; it quantizes nothing else.",
    "merged": "This folder has dense weights in full precision, made from these.",
    "packed": "This folder has all of it.",
}

PIPELINES = {
    "causal_lm": "text-generation", "seq2seq_lm": "text2text-generation",
    "image_classification": "image-classification",
}  # fmt: skip
"""What the hub calls a task, by `Task.problem`; all others are text-classification."""

ROWS = {
    "score": "score", "perplexity": "perplexity", "nll": "NLL, nats",
    "ece": "expected calibration error",
    "relative_bops_32": "bit operations relative to 32 x 32 bits",
    "relative_bops_16": "bit operations relative to 16 x 16 bits",
    "adapter_bytes": "bytes of the adapters",
}  # fmt: skip


def model_card(
    manifest: Manifest, metrics: Mapping[str, float], by: str, pad_token_id: int | None
) -> str:
    """Write the card, in Markdown with the front matter that the hub reads.

    Parameters
    ----------
    manifest : Manifest
        Of the export.
    metrics : mapping of str to float
        As `export` returns them.
    by : str
        The rule that decided.
    pad_token_id : int or None
        Of the backbone, or of its tokenizer where it has none; None if it reads images.
    """
    name, task = manifest.backbone, manifest.task.name
    library = {"peft": "peft", "merged": "transformers"}.get(manifest.form, "bayes-lora")
    front = [
        f"library_name: {library}",
        f"pipeline_tag: {PIPELINES.get(manifest.task.problem, 'text-classification')}",
        "tags: [bayes-lora, lora, quantization]",
    ]
    source = name
    if Path(name).is_dir():  # a folder means nothing to others
        name, source = Path(name).name, "BACKBONE"
    else:
        front.append(f"base_model: {name}")
    numbers = ["| | as decided | in this folder |", "|---|---|---|"]
    for key, text in ROWS.items():
        if key in metrics:
            own = metrics.get(f"exported_{key}")
            numbers.append(
                f"| {text} | {metrics[key]:.4g} | {'' if own is None else f'{own:.4g}'} |"
            )
    layers = manifest.layers
    specs = [LayerSpec(path, layer["in"], layer["out"]) for path, layer in layers.items()]
    rows = [f"| layer | rank | {' | '.join(TENSORS)} |", "|---" * (len(TENSORS) + 2) + "|"]
    for short, layer in zip(short_names(specs), layers.values(), strict=True):
        cells = [short, layer["rank"], *(layer["bits"][tensor] for tensor in TENSORS)]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return CARD.format(
        front="\n".join(front), title=f"{name}, {task}, {manifest.form}", name=name, task=task,
        version=version("bayes-lora"), use=_use(manifest, source, pad_token_id),
        metrics="\n".join(numbers), by=by, kept=KEPT[manifest.form], layers="\n".join(rows),
    )  # fmt: skip


def _use(manifest: Manifest, source: str, pad_token_id: int | None) -> str:
    """Python that loads the export, and the backbone from its source."""
    task = manifest.task
    if manifest.form == "packed":
        one = '"image.png"' if task.has_images else '"A text."'
        pair = len(task.given_columns) == 2
        return LOAD.format(example='("One text.", "Another.")' if pair else one)
    of_task = MODELS[task.problem].__name__
    if manifest.form == "merged":
        return STOCK.format(of_task=of_task, arguments='"FOLDER"')
    if task.is_language_model:
        return STOCK.format(of_task=of_task, arguments=f'"{source}", dtype="float32"') + PEFT
    names = dict(enumerate(task.label_names))
    arguments = [f'"{source}"', 'dtype="float32"', f"num_labels={task.num_labels}"]
    arguments.append("ignore_mismatched_sizes=True")
    arguments += [f"id2label={names}"] * bool(names)
    if pad_token_id is not None:
        arguments.append(f"pad_token_id={pad_token_id}")  # a decoder's own may be none
    text = "".join(f"\n    {a}," for a in arguments) + "\n"
    return STOCK.format(of_task=of_task, arguments=text) + PEFT
