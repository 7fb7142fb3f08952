"""Export a finished run: `bayes-lora export RUN --format peft|merged|packed --to DIR`.

    peft      adapter for stock PEFT: adapters as decided, base and activations in full precision
    merged    folder for transformers' from_pretrained: adapters merged into the decided weights,
              activations in full precision; merge_report.json has the score before and after
    packed    the network as decided, every quantized tensor in its own bits (`packed.py`)

Each comes with its tokenizer or image processor, a model card, and bayes_lora.json, by which
`bayes_lora.load` knows it. In regression the head's output is in units of the labels, if the head
has a bias, as those of encoders have and those of decoders have not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayes_lora.decided import decide_network
from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import DEMO, absolute, load_backbone, rescale_head
from bayes_lora.inference.card import model_card
from bayes_lora.inference.cli import Parser, report_errors
from bayes_lora.inference.decide import JUDGED, judge
from bayes_lora.inference.decision import decided_by
from bayes_lora.inference.files import write_text
from bayes_lora.inference.manifest import Manifest, write_manifest
from bayes_lora.inference.metrics import evaluate_predictions
from bayes_lora.inference.packed import layout, write_packed
from bayes_lora.inference.peft_adapter import decided_layers, write_peft
from bayes_lora.inference.predict import predictions
from bayes_lora.inference.quiet import quiet
from bayes_lora.inference.trained import Trained, Validation, read_run, validation_if_there
from bayes_lora.models.likelihoods import Regression
from bayes_lora.next_tokens import IGNORED


def decided_model(run: Trained) -> PreTrainedModel:
    """The network at the decision, as a transformers model; the run is used up.

    Classes have their names.
    """
    model = cast(
        PreTrainedModel,
        decide_network(run.model.network, run.guide.loc, *run.gates),
    )
    config, names = model.config, run.task.label_names
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = "single_label_classification"
    elif isinstance(run.model.likelihood, Regression):
        config.problem_type = "regression"
    return model


def _in_units(model: PreTrainedModel, likelihood: nn.Module, form: str) -> tuple[float, float]:
    """Have the head of a regression give the units of the labels, or say what is left to do."""
    if not isinstance(likelihood, Regression):
        return 1.0, 0.0
    units = float(likelihood.spread), float(likelihood.center)
    try:
        rescale_head(model, *units)
    except InputError as error:
        if form != "packed":
            raise InputError(f"{error}: choose packed") from error
        return units
    return 1.0, 0.0


def _peft(model: PreTrainedModel, manifest: Manifest, folder: Path) -> nn.Module:
    task = manifest.task
    stock = load_backbone(manifest.backbone, task.num_labels, task.problem).model
    return write_peft(model, stock, manifest.backbone, folder)


def _merged(model: PreTrainedModel, manifest: Manifest, folder: Path) -> nn.Module:
    for path, layer in decided_layers(model).items():
        model.set_submodule(path, layer.merged())
    model.save_pretrained(folder)
    return model


def _packed(model: PreTrainedModel, manifest: Manifest, folder: Path) -> nn.Module:
    write_packed(folder / "packed.safetensors", model, decided_layers(model), manifest.with_base)
    model.config.save_pretrained(folder)
    return model


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
        Costs of the decision and, if the validation set is there, its `score`, `nll` and `ece`; the
        same of the export, `exported_...`; and the `largest_logit_change` between them.

    Raises
    ------
    InputError
        If there is no such format, the folder is there, or the run cannot be had in this format.
    """
    if form not in FORMATS:
        raise InputError(f"there is no format {form!r}; choose one of {', '.join(FORMATS)}")
    if folder.exists():
        raise InputError(f"{folder} is there already: name another folder")
    data = validation_if_there(run)
    metrics = judge(run, run.gates, data)
    likelihood = run.model.likelihood
    by = decided_by(run.folder / "decision.json")
    model = decided_model(run).eval()
    units = _in_units(model, likelihood, form)
    manifest = Manifest(
        form,
        absolute(run.config.network.backbone or DEMO),
        run.task,
        run.config.data.max_length,
        (likelihood.spread * likelihood.log_noise.exp()).item()
        if isinstance(likelihood, Regression)
        else None,
        units,
        with_base or form == "merged",
        layout(decided_layers(model)),
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as made:
            partial = Path(made) / folder.name
            partial.mkdir()
            before = None if data is None else _logits(model, data, run.task.ahead)
            exported = FORMATS[form](model, manifest, partial).eval()
            if data is not None and before is not None:
                change = (_logits(exported, data, run.task.ahead) - before).abs().max()
                metrics["largest_logit_change"] = float(change)
                metrics |= _measured(exported, manifest, data)
            if form == "merged":
                write_text(partial / "merge_report.json", json.dumps(metrics, indent=2) + "\n")
            run.processor.save_pretrained(partial)
            write_manifest(partial, manifest)
            card = model_card(manifest, metrics, by, getattr(model.config, "pad_token_id", None))
            write_text(partial / "README.md", card)
            partial.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    return metrics


@torch.no_grad()
def _logits(model: nn.Module, data: Validation, ahead: int) -> Tensor:
    """All of a classifier; of a language model, those of the tokens that are there."""
    found = []
    for batch in data.loader:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if labels.ndim == 2:
            place = labels[:, ahead:, None]
            of_these = logits[:, : place.shape[1]]
            logits = of_these.gather(-1, place.clamp(min=0))[place != IGNORED]
        found.append(logits)
    return torch.cat(found)


def _measured(model: nn.Module, manifest: Manifest, data: Validation) -> dict[str, float]:
    found = predictions(
        lambda x: manifest.distribution(model(**x).logits), data.loader, torch.device("cpu")
    )
    judged = evaluate_predictions(manifest.task, found, data.labels)
    return {f"exported_{name}": judged[name] for name in JUDGED if name in judged}


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
    print(f"Exported to {options.to}; README.md there says how to load it")


if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
