"""Small files of examples, a tokenizer that needs no model, and the command on a tiny backbone."""

import csv
import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bayes_lora.errors import InputError
from bayes_lora.inference import cells, compare, frontier, posterior
from bayes_lora.inference.agreement import generate
from bayes_lora.inference.bundle import Draws, bundle
from bayes_lora.inference.cli import main
from bayes_lora.inference.data import DataConfig, load_task
from bayes_lora.inference.draws import draw_posterior, draw_prior
from bayes_lora.inference.history import History
from bayes_lora.inference.predictive import ClassProbabilities
from bayes_lora.inference.train import record_step
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA
from bayes_lora.models.priors import IndependentGates, Priors

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]


@pytest.fixture
def tokenizer():
    """Single letters; [CLS] a [SEP] for one text, [CLS] a [SEP] b [SEP] for two."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def write():
    """Write examples as JSON lines, return the path."""

    def write(path, examples):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        return str(path)

    return write


@pytest.fixture
def custom(tmp_path, write):
    """Write both files, return the configuration that reads them."""

    def config(train, validation=None, **options):
        files = {
            "train_file": write(tmp_path / "train.jsonl", train),
            "validation_file": write(tmp_path / "dev.jsonl", validation or train),
        }
        return DataConfig(**files, **options)

    return config


@pytest.fixture
def error_of():
    """Load a configuration that is wrong, return the one line that says what."""

    def error_of(config):
        with pytest.raises(InputError) as caught:
            load_task(config, seed=0)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return error_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved model and two small files of examples."""
    path = tmp_path_factory.mktemp("inputs")
    rows = {
        split: generate(size, seed=0, split=split)
        for split, size in (("train", 120), ("validation", 60))
    }
    words = {w for part in rows.values() for row in part for w in row["sentence"].split()}
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    ).save_pretrained(path / "model")
    for split, part in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (path / f"{split}.jsonl").write_text(text)
        scores = [row | {"label": len(row["sentence"]) / 20} for row in part]
        text = "".join(json.dumps(row) + "\n" for row in scores)
        (path / f"{split}_scores.jsonl").write_text(text)
    return path, len(vocabulary)


@pytest.fixture
def inputs(folder, backbone):
    path, size = folder
    if not (path / "model" / "config.json").exists():
        made = backbone(vocab_size=size, hidden_dropout_prob=0.1)
        made.save_pretrained(path / "model")
    return path


@pytest.fixture
def small_run(inputs):
    """Options of a run on the tiny model, by name."""
    return {
        "train_file": inputs / "train.jsonl",
        "validation_file": inputs / "validation.jsonl",
        "text_columns": "sentence",
        "backbone": inputs / "model",
        "max_length": 40,
        "epochs": 4,
    }


@pytest.fixture
def few_draws(monkeypatch):
    """Keep fewer draws in posterior.nc than a run otherwise does."""
    monkeypatch.setattr(posterior, "POSTERIOR_DRAWS", 4)
    monkeypatch.setattr(posterior, "PRIOR_DRAWS", 3)


@pytest.fixture
def command(small_run, tmp_path, capsys, few_draws):
    """Run `bayes-lora finetune` with changes to a small run; returns exit code and outputs."""

    def run(**changes):
        AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would
        small = {"rank": 3, "batch_size": 20, "draws": 2, "output_dir": tmp_path / "run"}
        options = small_run | small | changes
        arguments = ["finetune"]
        for name, value in options.items():
            if value is not None:
                arguments += [f"--{name}", *str(value).split()]
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def pretrained(inputs, backbone, tmp_path):
    """Save a language model of a kind, drawn at random; returns its folder."""

    def make(kind):
        tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
        for part in (tokenizer, backbone(f"{kind} writes", vocab_size=len(tokenizer))):
            part.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.fixture
def decided_run(command, tmp_path, inputs, backbone):
    """Folder of a run whose gates differ from layer to layer, on the named architecture."""

    def make(kind="bert", **changes):
        if kind != "bert":
            folder = tmp_path / kind
            tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
            backbone(kind, vocab_size=len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            changes |= {"backbone": folder, "max_length": 30}
        code, _, err = command(**{"price": 3, "epochs": 3, "learning_rate": 0.01} | changes)
        assert code == 0, err
        decide_at_random(tmp_path / "run")
        return tmp_path / "run"

    return make


def decide_at_random(folder):
    """Ranks 0 to 3, bits 2 to 16, all of which occur."""
    path = folder / "decision.json"
    content = json.loads(path.read_text())
    draw = np.random.default_rng(3)
    for index, layer in enumerate(content["layers"].values()):
        if "components" in layer:
            layer["components"] = list(range(1, 1 + index % 4))
        if "bits" in layer:
            layer["bits"] = {tensor: int(2 ** draw.integers(1, 5)) for tensor in layer["bits"]}
    path.write_text(json.dumps(content))


@pytest.fixture
def cells_here(monkeypatch):
    """Train the cells of a comparison in this process."""

    def here(method, words, folder):
        found = cells.finished(method, words, folder)
        if found is None:
            cells.train_cell(method, words, folder)
            found = cells.finished(method, words, folder)
        return found

    for command in (compare, frontier):
        monkeypatch.setattr(command, "in_a_process", here)


@pytest.fixture
def run_compare(small_run, tmp_path, capsys, few_draws, cells_here):
    """Run `bayes-lora compare`, the cells in this process; returns exit code and outputs."""

    def run(*words, **changes):
        options = small_run | {"rank": 3, "batch_size": 20, "draws": 2, "epochs": 2} | changes
        given = ((name, value) for name, value in options.items() if value is not None)
        words = [*words, *(word for name, value in given for word in (f"--{name}", str(value)))]
        code = main(["compare", *words, "--output_dir", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def read_history():
    """Read the history that a run left, one dict a step."""
    return lambda path: list(csv.DictReader((path / "history.csv").read_text().splitlines()))


@pytest.fixture
def made_bundle(network, tmp_path):
    """Make a bundle of a guide with the given gate logits, with invented examples."""

    def make(rank_logits=None, bit_logits=None, draws=60, seed=0, classes=("no", "yes")):
        gates = IndependentGates(rank_logits=-0.7, bit_logits=0.3)
        made = {"rank": rank_logits, "bit": bit_logits}
        kinds = [name for name, logits in made.items() if logits is not None]
        model = BayesianLoRA(
            network, Classification(), Priors(gates=gates), num_examples=80,
            rank_gates=rank_logits is not None, bit_gates=bit_logits is not None,
        )  # fmt: skip
        guide = GateGuide(model, torch.zeros(network.num_adapter_weights))
        generator = torch.Generator().manual_seed(seed)
        numbers = np.random.default_rng(seed)
        with History(tmp_path / f"history{seed}.csv", model, guide, steps=4) as history:
            for step, phase in enumerate(("warmup", "joint", "joint", "settle")):
                terms = {"log_likelihood": -60.0 + step, "kl_adapter_weights": 3.0}
                if phase == "joint" and kinds:
                    terms |= {f"kl_{n}_gate": 10.0 * step for n in kinds} | {"energy": 5.0}
                history.add(record_step(step, phase, 1.0, {"loss": 56.0} | terms, {}, model))
        with torch.no_grad():
            for parameter, logits in (
                (guide.rank_logits, rank_logits), (guide.bit_logits, bit_logits)
            ):  # fmt: skip
                if logits is not None:
                    parameter.copy_(logits)
        labels = np.array([0, 1, 1, 0, 1, 1, 1, 0, 1])
        right = numbers.beta(2, 1, (draws, 9))  # better than the labels' frequencies
        probability = np.stack([np.where(labels == k, right, 1 - right) for k in (0, 1)], -1)
        drawn = draw_posterior(guide, draws, generator)
        return bundle(
            network,
            Draws(
                gates=drawn,
                log_likelihood=ClassProbabilities(probability).log_likelihood(labels),
                predicted_labels=labels[None].repeat(draws, 0),
                log_q=numbers.normal(size=draws),
                log_p=numbers.normal(size=draws),
                predictions=ClassProbabilities(probability),
            ),
            prior=draw_prior(model, 200, generator),
            prior_draws=200,
            history=history,
            labels=dict(enumerate(labels.tolist())),
            validation_labels=labels,
            classes=classes,
            attributes={
                "task": "custom",
                "training_examples": 80,
                "rank_structure": "nested",
                "weight_posterior": "delta",
                "weight_temperature": 1.0,
            },
        )

    return make
