"""What each of two processes does: `python side_by_side.py FOLDER`, as a launcher starts it.

Writes FOLDER/found-INDEX.pt. `together` is also called by the tests, as the only process.
"""

import os
import signal
import sys
from pathlib import Path

import pyro
import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import BertConfig, BertForSequenceClassification

from bayes_lora.errors import InputError, Interrupted
from bayes_lora.inference import posterior, predict_file, processes, train_run
from bayes_lora.inference.batches import evaluation_batches
from bayes_lora.inference.checkpoint import CHECKPOINTS
from bayes_lora.inference.config import parse
from bayes_lora.inference.elbo import TermwiseELBO
from bayes_lora.inference.finetune import finetune
from bayes_lora.inference.optimisation import Optimisation
from bayes_lora.inference.phases import Phase
from bayes_lora.inference.predict import predict
from bayes_lora.inference.train import fit
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import Priors
from bayes_lora.network import AdaptedNetwork

EXAMPLES, STEPS = 48, 6


def pair():
    """A model and guide without dropout, whose gates' divergences and weights' all count."""
    torch.manual_seed(7)
    size = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 40, "initializer_range": 0.3,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    network = AdaptedNetwork(BertForSequenceClassification(BertConfig(**size)), rank=3)
    model = BayesianLoRA(network, Classification(), Priors(), EXAMPLES)
    guide = GateGuide(model, 0.3 * torch.randn(network.num_adapter_weights))
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in loader(EXAMPLES)]
    network.calibrate(inputs, guide.loc)
    return model, guide


def data():
    """Examples of 3 to 9 tokens."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 10, (EXAMPLES,), generator=draw).tolist()
    return [
        {
            "input_ids": torch.randint(1, 60, (n,), generator=draw),
            "labels": torch.randint(2, (), generator=draw),
        }
        for n in lengths
    ]


def collate(examples):
    ids = [each["input_ids"] for each in examples]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    batch = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    labels = [each["labels"] for each in examples if "labels" in each]
    return batch | ({"labels": torch.stack(labels)} if labels else {})


def held(model):
    """Gates of every kind of value: ranks 0 to 3, all bit widths."""
    draw = torch.Generator().manual_seed(2)
    shapes = model.network.rank_gate_shape, model.network.bit_gate_shape
    return Gates(*(torch.randint(2, s, generator=draw).float() for s in shapes))


def loader(batch_size):
    draw = torch.Generator().manual_seed(3)
    return DataLoader(
        data(), batch_size, sampler=RandomSampler(data(), generator=draw), collate_fn=collate,
        drop_last=True,
    )  # fmt: skip


def gradients(batches):
    """Gradient of the loss at held gates, of the batches of this process; and of `processes`."""
    model, guide = pair()
    gates = held(model)
    module = processes.accelerator(cpu=True).prepare(TermwiseELBO()(model, guide))
    batch = dict(batches)
    module(batch, batch.pop("labels"), 0.7, gates).backward()
    return {n: p.grad for n, p in named(model, guide).items() if p.grad is not None}


def named(model, guide):
    parts = {"model": model, "guide": guide}
    return {
        f"{part}.{name}": p
        for part, module in parts.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def trained(batch_size, accumulation=1):
    """How all parameters change in a few steps with gates held open, as one vector; the history."""
    model, guide = pair()
    before = {n: p.detach().clone() for n, p in named(model, guide).items()}
    phases = [Phase("warmup", "open", STEPS)]
    records = []
    fit(
        model, guide, loader(batch_size), phases, Optimisation(0.01),
        processes.accelerator(cpu=True), records.append, accumulation=accumulation,
    )  # fmt: skip
    changes = [(p.detach() - before[n]).flatten() for n, p in named(model, guide).items()]
    return torch.cat(changes), records


def predicted():
    """Probabilities of all examples, in their order; nine batches are no multiple of two."""
    model, guide = pair()
    texts = [{"input_ids": each["input_ids"].tolist()} for each in data()]

    class Texts(list):
        def __getitem__(self, key):
            found = super().__getitem__
            return [each["input_ids"] for each in self] if key == "input_ids" else found(key)

    def tensors(examples):
        return collate([{"input_ids": torch.tensor(each["input_ids"])} for each in examples])

    return predict(model, guide, evaluation_batches(Texts(texts), tensors, 5), held(model))[0]


def draws():
    """Numbers drawn apart, alike, and apart again."""
    torch.manual_seed(5)
    processes.draw_apart(5)
    apart = torch.rand(3)
    with processes.drawing_alike():
        alike = torch.rand(3)
    return apart, alike, torch.rand(3)


def configured(folder, *more):
    words = ["--train_file", folder / "train.jsonl", "--validation_file", folder / "dev.jsonl",
             "--text_columns", "sentence", "--backbone", folder / "model", "--max_length", 40,
             "--epochs", 4, "--rank", 3, "--batch_size", 10, "--draws", 2]  # fmt: skip
    return parse([str(word) for word in [*words, *more]])


class Writes:
    """Files under a folder that this process opens to write, renames or removes."""

    def __init__(self, folder):
        self.folder, self.found = str(folder), []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if event == "open" and isinstance(arguments[1], str) and arguments[1][:1] == "r":
            return
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            name = os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else ""
            if name.startswith(self.folder):
                self.found.append((event, name))


def stopped(config, lines):
    """Exit code of a run that the second process is told to stop after so many lines of history."""
    record = train_run.History.add
    count = [0]

    def add(self, line):
        record(self, line)
        count[0] += 1
        if count[0] == lines and processes.state().process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train_run.History.add = add
    try:
        finetune(config)
    except Interrupted as interrupted:
        return 128 + interrupted.signal
    finally:
        train_run.History.add = record
    return 0


def refused(config):
    try:
        finetune(config)
    except InputError as error:
        return str(error)
    return ""


def together(folder):
    """All that two processes do side by side; from each, what it found."""
    index = processes.state().process_index
    rows = next(iter(loader(EXAMPLES)))
    halves = [{k: v[i * 24 : i * 24 + 24] for k, v in rows.items()} for i in range(2)]
    found = {"gradients": gradients(halves[index]), "trained": trained(8), "draws": draws(),
             "predicted": predicted(), "most": processes.most(index + 0.5, 1 - index),
             "of_main": processes.of_main(index),
             "share": processes.joined(list(processes.share("abcde")))}  # fmt: skip
    pyro.clear_param_store()
    writes = Writes(folder / "whole")
    found["metrics"] = finetune(configured(folder, "--output_dir", folder / "whole"))
    found["writes"] = writes.found
    halting = ("--output_dir", folder / "stopped", "--save_steps", 5)
    found["exit"] = stopped(configured(folder, *halting), 7)
    found["resumed"] = finetune(configured(folder, *halting, "--resume"))
    found["refused"] = refused(configured(folder, "--output_dir", folder / "whole"))
    refine = ("--method", "r", "--refine_epochs", 1, "--epochs", 1)
    found["refined"] = finetune(configured(folder, "--output_dir", folder / "refined", *refine))
    halting = ("--output_dir", folder / "halted", *refine)
    found["halted"] = stopped(configured(folder, *halting), 6)  # after two of three iterations
    processes.wait()  # the main one writes
    found["kept"] = [path.name for path in (folder / "halted" / CHECKPOINTS).iterdir()]
    processes.wait()
    found["refined on"] = finetune(configured(folder, *halting, "--resume"))
    chains = ("--output_dir", folder / "chains", "--restarts", 2, "--epochs", 1)
    found["chains"] = finetune(configured(folder, *chains))
    words = [folder / "whole", "--input", folder / "texts.jsonl", "--output", folder / "two.csv"]
    predict_file.run([str(word) for word in words])  # at its end the processes part
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    posterior.POSTERIOR_DRAWS, posterior.PRIOR_DRAWS = 4, 3
    torch.save(together(place), place / f"found-{os.environ['RANK']}.pt")
