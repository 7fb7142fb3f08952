"""`bayes_lora.load`: a finished run, or an export of one, as something that predicts.

    run = bayes_lora.load("runs/demo")
    run.predict(["The keys to the cabinet are here ."], draws=8)

With draws, probabilities are averaged over the posterior (`predict.described`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import HfApi, snapshot_download
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
)

from bayes_lora.errors import InputError, one_line
from bayes_lora.inference.backbone import MODELS, load_backbone, load_processor
from bayes_lora.inference.batches import evaluation_batches
from bayes_lora.inference.draws import draw_posterior, draw_weights, unbound
from bayes_lora.inference.encoding import Processor, collator, encode, labels_of
from bayes_lora.inference.export import export
from bayes_lora.inference.manifest import NAME, Manifest, read_manifest
from bayes_lora.inference.packed import read_packed
from bayes_lora.inference.predict import predictions, stacked
from bayes_lora.inference.predictive import TextProbabilities
from bayes_lora.inference.tasks import Task
from bayes_lora.inference.trained import read_run
from bayes_lora.network import Latents

Labels = Callable[[dict[str, Tensor]], torch.distributions.Distribution]
"""From a batch of inputs to the distribution of its labels."""


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned network that predicts texts, or images.

    Attributes
    ----------
    folder : Path
        Where it was read from.
    task : Task
        What texts or images and labels mean.
    processor : PreTrainedTokenizerBase or BaseImageProcessor
        Of the backbone.
    max_length : int
        Tokens of an example at most.
    device : torch.device
        Where it computes.
    collate : function
        From a list of encoded examples to a batch.
    decided : function
        Distribution of the labels of a batch at the decision.
    draw : function or None
        From a number and a seed to so many such functions, each at a draw of the posterior; an
        export has no posterior.
    """

    folder: Path
    task: Task
    processor: Processor
    max_length: int
    device: torch.device
    collate: Callable[[list[Any]], dict[str, Tensor]]
    decided: Labels
    draw: Callable[[int, int], list[Labels]] | None = None

    def predict(
        self, texts: Sequence[str | Path | tuple[str, str]], draws: int = 0, seed: int = 0
    ) -> dict[str, NDArray[Any]]:
        """Predict texts, pairs of texts, or images.

        Parameters
        ----------
        texts : sequence of str, or of pairs of str
            As many as wanted; they are all in memory at once. Of images the paths, which may be
            Path objects; of `seq2seq_lm` pairs of what is read and what is written.
        draws : int
            Draws of the posterior to average over; 0 for the decision.
        seed : int
            Of the draws.

        Returns
        -------
        dict of str to ndarray
            First axis N, the texts. Classification: `label` (names), `probability` of it,
            `probabilities` (N, classes), `entropy`, `entropy_data`, `entropy_posterior` in nats.
            Regression: `label`, the mean, `variance`, `variance_data`, `variance_posterior`.
            Language model: `log_probability` of the text, nats, its standard deviation between
            the draws, `deviation_posterior`, and `tokens`, how many were predicted.

        Raises
        ------
        InputError
            If draws are asked of an export, or a text is not what the task has, or an image
            cannot be read.
        """
        columns = self._columns(texts)
        if draws < 0 or not 0 <= seed < 2**32:
            raise InputError("draws must be at least 0, and seed from 0 to 4294967295")
        if draws and self.draw is None:
            raise InputError(f"{self.folder} is an export without a posterior: no draws")
        named = dict(zip(self.task.given_columns, columns, strict=True))
        pieces = encode(named, self.task, self.processor, self.max_length)
        if not pieces.text:
            zeros = np.zeros(len(columns[0]))
            return TextProbabilities(zeros[None]).described(()) | {"tokens": zeros.astype(int)}
        data = Dataset.from_dict(pieces.columns)
        loader = evaluation_batches(data, self.collate)
        with torch.random.fork_rng():  # the caller's random state stays as it is
            each = self.draw(draws, seed) if draws and self.draw else [self.decided]
            found = stacked([predictions(labels, loader, self.device) for labels in each])
        if not isinstance(found, TextProbabilities):
            return found.described(self.task.label_names)
        number = len(columns[0])
        tokens = np.bincount(pieces.text, labels_of(data), number).astype(int)
        return found.of_whole_texts(pieces.text, number).described(()) | {"tokens": tokens}

    def _columns(self, texts: Sequence[str | Path | tuple[str, str]]) -> list[list[str]]:
        """The texts by column, checked."""
        wanted = self.task.given_columns
        if isinstance(texts, str | Path) or len(texts) == 0:
            raise InputError("give a list of texts, one or more")
        if self.task.has_images:
            texts = [str(path) if isinstance(path, Path) else path for path in texts]
        rows = [tuple(row) if isinstance(row, tuple | list) else (row,) for row in texts]
        for number, row in enumerate(rows):
            if len(row) != len(wanted) or not all(isinstance(text, str) for text in row):
                raise InputError(f"text {number} is not what this task has: {' and '.join(wanted)}")
        return [list(column) for column in zip(*rows, strict=True)]

    def save_pretrained(
        self, folder: str | Path, form: str = "packed", with_base: bool = True
    ) -> None:
        """Write an export of a run; an export itself is copied as it is.

        Parameters
        ----------
        folder : str or Path
            Must not be there yet.
        form : str
            Of a run: peft, merged or packed.
        with_base : bool
            Of packed: with the frozen weights, so that it can be loaded where the backbone is not.

        Raises
        ------
        InputError
            If the folder is there, or the run cannot be had in this format.
        """
        if self.draw is not None:
            export(read_run(self.folder), form, Path(folder), with_base and form == "packed")
        elif Path(folder).exists():
            raise InputError(f"{folder} is there already: name another folder")
        else:
            shutil.copytree(self.folder, folder)

    def push_to_hub(
        self, repo_id: str, form: str = "packed", with_base: bool = True, private: bool = False
    ) -> str:
        """Put an export on the hub, and return its address; see `save_pretrained`.

        Raises
        ------
        InputError
            As of `save_pretrained`, or if the hub cannot be reached or refuses.
        """
        api = HfApi()
        with TemporaryDirectory() as parent:
            folder = Path(parent) / "export"
            self.save_pretrained(folder, form, with_base)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
            except Exception as error:  # whatever the hub's client raises
                raise InputError(f"the hub does not take {repo_id} ({one_line(error)})") from error


def load(name: str | Path, device: str | torch.device = "cpu") -> FineTuned:
    """Load a finished run, or an export of one.

    Parameters
    ----------
    name : str or Path
        Output folder of `bayes-lora finetune` or `bayes-lora export`, or an export on the hub.
    device : str or torch.device
        Where to compute.

    Returns
    -------
    FineTuned
        Ready to predict.

    Raises
    ------
    InputError
        If there is no such folder, or it is neither.

    Examples
    --------
    >>> import bayes_lora
    >>> bayes_lora.load("runs/demo").predict(["She sings ."])["label"]  # doctest: +SKIP
    array(['acceptable'], dtype='<U12')
    """
    folder = Path(name)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(str(name)))
        except Exception as error:  # whatever the hub's client raises
            raise InputError(
                f"there is no folder {name}, and no such model on the hub ({one_line(error)})"
            ) from error
    kind = _export if (folder / NAME).is_file() else _run
    return kind(folder, torch.device(device))


def _run(folder: Path, device: torch.device) -> FineTuned:
    run = read_run(folder)
    model, guide = run.model.to(device), run.guide.to(device)

    def at(latents: Latents) -> Labels:
        return lambda batch: model.likelihood(model.network(batch, latents))

    def draw(draws: int, seed: int) -> list[Labels]:
        generator = torch.Generator().manual_seed(seed)
        gates = unbound(draw_posterior(guide, draws, generator), draws)
        torch.manual_seed(seed)  # adapter weights are drawn from a Pyro distribution
        weights = [draw_weights(model, guide, held) for held in gates]
        return [
            at(Latents(w, *held.map(lambda gate: gate.to(device))))
            for w, held in zip(weights, gates, strict=True)
        ]

    length = run.config.data.max_length
    decided = at(Latents(guide.loc.detach(), *run.gates.map(lambda gate: gate.to(device))))
    collate = collator(run.task, run.processor, model.network.backbone)
    return FineTuned(folder, run.task, run.processor, length, device, collate, decided, draw)


def _export(folder: Path, device: torch.device) -> FineTuned:
    manifest = read_manifest(folder)
    try:
        network = _network(folder, manifest).eval().to(device)
        processor = load_processor(folder, manifest.task.problem)
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError,
            RuntimeError) as error:  # fmt: skip
        raise InputError(f"{folder} is damaged ({one_line(error)}): export again") from error
    return FineTuned(
        folder, manifest.task, processor, manifest.max_length, device,
        collator(manifest.task, processor, network),
        lambda batch: manifest.distribution(network(**batch).logits),
    )  # fmt: skip


def _network(folder: Path, manifest: Manifest) -> nn.Module:
    of_task = MODELS[manifest.task.problem]
    if manifest.form == "merged":
        return cast(nn.Module, of_task.from_pretrained(folder, trust_remote_code=False))
    if manifest.form == "packed":
        if manifest.with_base:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = of_task.from_config(config, dtype=torch.float32, trust_remote_code=False)
        else:
            model = _stock(folder, manifest)
        state = load_file(folder / "packed.safetensors")
        return read_packed(state, model, manifest.layers, manifest.with_base)
    if manifest.form != "peft":
        raise ValueError(f"unknown format {manifest.form!r}")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{folder} is PEFT's: pip install 'bayes-lora[compare]'") from error

    return cast(nn.Module, PeftModel.from_pretrained(_stock(folder, manifest), str(folder)))


def _stock(folder: Path, manifest: Manifest) -> PreTrainedModel:
    """The backbone that an export was made from, which it has not in itself."""
    try:
        task = manifest.task
        return load_backbone(manifest.backbone, task.num_labels, task.problem).model
    except InputError as error:
        raise InputError(f"{folder} needs its backbone: {error}") from error
