"""`bayes_lora.load`: a finished run, or an export of one, as something that predicts texts.

    run = bayes_lora.load("runs/demo")
    run.predict(["The keys to the cabinet are here ."], draws=8)

With draws of the posterior the probabilities p_s of S draws are averaged, and the entropy of the
average, in nats, is what the data leave open plus what the posterior leaves open:

    H(mean_s p_s) = mean_s H(p_s) + I,        I >= 0 the mutual information of label and latents.

In regression the same holds of variances: that of the noise, and that of the means.
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
from scipy import stats
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.batches import evaluation_batches
from bayes_lora.inference.draws import draw_posterior, draw_weights, unbound
from bayes_lora.inference.export import export
from bayes_lora.inference.manifest import NAME, read_manifest
from bayes_lora.inference.packed import read_packed
from bayes_lora.inference.predict import Prediction, averaged, predictions
from bayes_lora.inference.tasks import Task
from bayes_lora.inference.trained import read_run
from bayes_lora.network import Latents

Labels = Callable[[dict[str, Tensor]], torch.distributions.Distribution]
"""From a batch of inputs to the distribution of its labels."""


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned network that predicts texts.

    Attributes
    ----------
    folder : Path
        Where it was read from.
    task : Task
        What texts and labels mean.
    tokenizer : PreTrainedTokenizerBase
        Of the backbone.
    max_length : int
        Tokens of an example at most.
    device : torch.device
        Where it computes.
    decided : function
        Distribution of the labels of a batch at the decision.
    draw : function or None
        From a number and a seed to so many such functions, each at a draw of the posterior; an
        export has no posterior.
    """

    folder: Path
    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    device: torch.device
    decided: Labels
    draw: Callable[[int, int], list[Labels]] | None = None

    def predict(
        self, texts: Sequence[str | tuple[str, str]], draws: int = 0, seed: int = 0
    ) -> dict[str, NDArray[Any]]:
        """Predict texts, or pairs of texts.

        Parameters
        ----------
        texts : sequence of str, or of pairs of str
            As many as wanted; they are all in memory at once.
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

        Raises
        ------
        InputError
            If draws are asked of an export, or a text is not what the task has.
        """
        each = [self.decided]
        if draws:
            if self.draw is None:
                raise InputError(f"{self.folder} is an export without a posterior: no draws")
            each = self.draw(draws, seed)
        pairs = len(self.task.text_columns) == 2
        columns = list(zip(*texts, strict=True)) if pairs else [texts]
        if len(columns) != len(self.task.text_columns):
            raise InputError(f"{self.task.name} has {' and '.join(self.task.text_columns)}")
        found = self.tokenizer(*map(list, columns), truncation=True, max_length=self.max_length)
        loader = evaluation_batches(
            Dataset.from_dict(dict(found)), DataCollatorWithPadding(self.tokenizer)
        )
        parts = [predictions(labels, loader, self.device) for labels in each]
        return described(
            self.task, (np.stack([a for a, _ in parts]), np.stack([b for _, b in parts]))
        )

    def save_pretrained(self, folder: str | Path, form: str = "packed") -> None:
        """Write an export; that of an export is a copy.

        Parameters
        ----------
        folder : str or Path
            Must not be there yet.
        form : str
            Of a run: peft, merged or packed.
        """
        if self.draw is None:
            shutil.copytree(self.folder, folder)
        else:
            export(read_run(self.folder), form, Path(folder))

    def push_to_hub(self, repo_id: str, form: str = "packed", private: bool = False) -> str:
        """Put an export on the hub, and return its address; parameters as of the hub's client."""
        api = HfApi()
        with TemporaryDirectory() as parent:
            folder = Path(parent) / "export"
            self.save_pretrained(folder, form)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


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
                f"there is no folder {name}, and no such model on the hub "
                f"({' '.join(str(error).split())[:120]})"
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
    return FineTuned(folder, run.task, run.tokenizer, length, device, decided, draw)


def _export(folder: Path, device: torch.device) -> FineTuned:
    manifest = read_manifest(folder)
    try:
        network = _network(folder).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, SafetensorError, AttributeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} is damaged ({reason}): export again") from error
    return FineTuned(
        folder, manifest.task, tokenizer, manifest.max_length, device,
        lambda batch: manifest.distribution(network(**batch).logits),
    )  # fmt: skip


def _network(folder: Path) -> nn.Module:
    manifest = read_manifest(folder)
    if manifest.form == "merged":
        return cast(nn.Module, AutoModelForSequenceClassification.from_pretrained(folder))
    if manifest.form == "packed":
        if manifest.with_base:
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = load_backbone(manifest.backbone, manifest.task.num_labels).model
        state = load_file(folder / "packed.safetensors")
        return read_packed(state, model, manifest.layers, manifest.with_base)
    from peft import PeftModel

    stock = load_backbone(manifest.backbone, manifest.task.num_labels).model
    return cast(nn.Module, PeftModel.from_pretrained(stock, str(folder)))


def described(task: Task, prediction: Prediction) -> dict[str, NDArray[Any]]:
    """Labels and uncertainties of predictions with a first axis for the draws.

    Examples
    --------
    >>> from bayes_lora.inference.tasks import TASKS
    >>> sure = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # two draws that contradict each other
    >>> found = described(TASKS["cola"], (sure, np.empty((2, 0))))
    >>> found["entropy"].round(3), found["entropy_data"].round(3)
    (array([0.693]), array([0.]))
    """
    mean, deviation = averaged(prediction)
    if task.is_regression:
        noise = (prediction[1] ** 2).mean(0)
        return {
            "label": mean, "variance": deviation**2, "variance_data": noise,
            "variance_posterior": (deviation**2 - noise).clip(0),
        }  # fmt: skip
    total, of_data = stats.entropy(mean, axis=-1), stats.entropy(prediction[0], axis=-1).mean(0)
    return {
        "label": np.array(task.label_names)[mean.argmax(-1)],
        "probability": mean.max(-1), "probabilities": mean, "entropy": total,
        "entropy_data": of_data, "entropy_posterior": (total - of_data).clip(0),
    }  # fmt: skip
