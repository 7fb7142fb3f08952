"""Export a finished run: `bayes-lora export RUN --format peft|merged|packed --to DIR`.

    peft      adapter for stock PEFT: adapters as decided, base and activations in full precision
    merged    folder for transformers' from_pretrained: adapters merged into the decided weights,
              activations in full precision; merge_report.json says what that changes
    packed    the network as decided, every quantized tensor in its own bits (`packed.py`)

Each comes with its tokenizer, a model card, and bayes_lora.json, by which `bayes_lora.load` knows
it. In regression the head's output is in units of the labels.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from bayes_lora.decided import decide_network
from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import default_backbone, load_backbone
from bayes_lora.inference.card import model_card
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.decide import judge
from bayes_lora.inference.files import write_text
from bayes_lora.inference.finetune import quiet
from bayes_lora.inference.manifest import Manifest, write_manifest
from bayes_lora.inference.metrics import evaluate_predictions
from bayes_lora.inference.packed import layout, write_packed
from bayes_lora.inference.peft_adapter import decided_layers, write_peft
from bayes_lora.inference.predict import predictions
from bayes_lora.inference.trained import Trained, read_run, validation
from bayes_lora.models.likelihoods import Regression

LOAD = "With bayes-lora: `bayes_lora.load(folder).predict(texts)`."
USE = {
    "peft": f"With PEFT: `PeftModel.from_pretrained(backbone, folder)`. {LOAD}",
    "merged": "With transformers: `AutoModelForSequenceClassification.from_pretrained(folder)`. "
    + LOAD,
    "packed": LOAD,
}


def decided_classifier(run: Trained) -> PreTrainedModel:
    """The network at the decision, as a transformers model; the run is used up.

    Classes have their names. In regression the output is in units of the labels.
    """
    likelihood = run.model.likelihood
    model = cast(
        PreTrainedModel,
        decide_network(run.model.network, run.guide.loc, *run.gates),
    )
    config, names = model.config, run.task.label_names
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = "single_label_classification"
    elif isinstance(likelihood, Regression):
        config.problem_type = "regression"
        _to_label_units(model, float(likelihood.center), float(likelihood.spread))
    return model


@torch.no_grad()
def _to_label_units(model: PreTrainedModel, center: float, spread: float) -> None:
    """Fold the likelihood's units into the last layer of the head."""
    prefix = f"{model.base_model_prefix}."
    heads = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(prefix)
    ]
    head = heads[-1] if heads else None
    if head is None or head.bias is None or head.out_features != 1:
        raise InputError(
            "this backbone's head ends in no linear layer with a bias, which the scale of a "
            "regression could be put into"
        )
    head.weight *= spread
    head.bias.copy_(spread * head.bias + center)


@dataclass(frozen=True)
class Decided:
    """What is exported: a run at its decision.

    Attributes
    ----------
    manifest : Manifest
        What the export will say of itself.
    model : PreTrainedModel
        With a `DecidedLinear` in place of every adapted layer.
    loader, labels
        The validation set.
    """

    manifest: Manifest
    model: PreTrainedModel
    loader: DataLoader
    labels: NDArray[np.number]

    def logits(self) -> Tensor:
        """Output for the whole validation set, as the loader orders it."""
        inputs = ({k: v for k, v in batch.items() if k != "labels"} for batch in self.loader)
        with torch.no_grad():
            return torch.cat([self.model(**batch).logits for batch in inputs])

    def metrics(self) -> dict[str, float]:
        """Score, NLL and ECE of what the model now is."""
        found = predictions(
            lambda x: self.manifest.distribution(self.model(**x).logits),
            self.loader,
            torch.device("cpu"),
        )
        judged = evaluate_predictions(self.manifest.task, *found, self.labels)
        return {name: judged[name] for name in ("score", "nll", "ece")}


def _peft(decided: Decided, folder: Path) -> dict[str, float]:
    backbone = decided.manifest.backbone
    stock = load_backbone(backbone, decided.manifest.task.num_labels).model
    write_peft(decided.model, stock, backbone, folder)
    return {}


def _merged(decided: Decided, folder: Path) -> dict[str, float]:
    before = decided.logits()
    for path, layer in decided_layers(decided.model).items():
        decided.model.set_submodule(path, layer.merged())
    decided.model.save_pretrained(folder)
    report = {"largest_logit_change": float((decided.logits() - before).abs().max())}
    report |= {f"merged_{name}": value for name, value in decided.metrics().items()}
    write_text(folder / "merge_report.json", json.dumps(report, indent=2) + "\n")
    return report


def _packed(decided: Decided, folder: Path) -> dict[str, float]:
    layers, with_base = decided_layers(decided.model), decided.manifest.with_base
    write_packed(folder / "packed.safetensors", decided.model, layers, with_base)
    decided.model.config.save_pretrained(folder)
    return {"bytes": float((folder / "packed.safetensors").stat().st_size)}


FORMATS = {"peft": _peft, "merged": _merged, "packed": _packed}


def export(run: Trained, form: str, folder: Path, with_base: bool = False) -> dict[str, float]:
    """Write a run in one of `FORMATS`.

    Parameters
    ----------
    run : Trained
        It is used up: its network becomes the decided one.
    form : str
        A name in `FORMATS`.
    folder : Path
        Must not be there yet; it is written whole or not at all.
    with_base : bool
        Of `packed`: whether all that is frozen is stored as well.

    Returns
    -------
    dict of str to float
        Metrics of the decision on the validation set; of `merged` what merging changed, of
        `packed` the size of the file.

    Raises
    ------
    InputError
        If the folder is there, or the run cannot be had in this format.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already: name another folder")
    by = json.loads((run.folder / "decision.json").read_text(encoding="utf-8"))["by"]
    metrics = judge(run, run.gates)
    loader, labels = validation(run)
    likelihood = run.model.likelihood
    model = decided_classifier(run)
    manifest = Manifest(
        form,
        run.config.network.backbone or default_backbone(),
        run.task,
        run.config.data.max_length,
        (likelihood.spread * likelihood.log_noise.exp()).item()
        if isinstance(likelihood, Regression)
        else None,
        with_base or form == "merged",
        layout(decided_layers(model)),
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        metrics |= FORMATS[form](Decided(manifest, model, loader, labels), partial)
        run.tokenizer.save_pretrained(partial)
        write_manifest(partial, manifest)
        write_text(partial / "README.md", model_card(manifest, metrics, USE[form], by))
        partial.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metrics


def run(arguments: Sequence[str] | None = None) -> None:
    """Export as the command line says, and print what came of it."""
    parser = Parser(
        prog="bayes-lora export", description="Export a finished run.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="output folder of bayes-lora finetune")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--to", type=Path, required=True, help="folder that is not there yet")
    parser.add_argument(
        "--with_base", action="store_true", help="of packed: the frozen weights as well"
    )
    options = parser.parse_args(arguments)
    if options.with_base and options.format != "packed":
        raise InputError("with_base goes with --format packed")
    quiet()
    metrics = export(read_run(options.run), options.format, options.to, options.with_base)
    for name, value in metrics.items():
        print(f"{name:24} {value:.6g}")
    print(f"Exported to {options.to}. {USE[options.format]}")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
