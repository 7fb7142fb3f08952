"""What the README says can be typed: its commands parse, its Python runs, its files exist."""

import re
import shlex
from contextlib import suppress
from pathlib import Path

import pyro
import pytest
import torch
from pyro import infer

from bayes_lora import network
from bayes_lora.inference import optimisation
from bayes_lora.inference.cli import main
from bayes_lora.inference.config import parse
from bayes_lora.models import guides, likelihoods, model, priors

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
NAMED_IN_README = (infer, guides, likelihoods, model, priors, network, optimisation)


def joined(text):
    """Text with continued lines as one."""
    return re.sub(r"\\\n\s*", "", text)


COMMANDS = re.findall(r"^    bayes-lora finetune (.*)$", joined(TEXT), flags=re.MULTILINE)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    config = parse(shlex.split(command.split("#")[0]))
    assert config.training.output_dir or config.posterior.prior_predictive


def test_other_commands_exist_with_their_options(capsys):
    others = re.findall(
        r"^    bayes-lora (?!finetune)(\w+) (.*)$", joined(TEXT), flags=re.MULTILINE
    )
    assert {name for name, _ in others} == {"diagnose", "decide", "export", "predict"}
    for name, words in others:
        with suppress(SystemExit):
            main([name, "--help"])
        options = capsys.readouterr().out
        given = shlex.split(words.split("#")[0])
        assert all(word in options for word in given if word.startswith("--"))


def test_the_demo_is_what_the_makefile_runs():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert COMMANDS[0] in joined(recipe)


def test_the_page_of_priors_runs():
    block = next(b for b in BLOCKS if "Priors(" in b)
    exec(compile(block, "README.md", "exec"), {})


def test_the_diff_against_a_lora_loop_runs_and_so_does_plain_svi(backbone, batch):
    diff = re.search(r"```diff\n(.*?)```", TEXT, re.DOTALL)[1]
    ours = "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))
    svi = next(b for b in BLOCKS if "SVI(" in b)
    labels = torch.tensor([0, 1, 1, 0, 1])
    names = {name: value for module in NAMED_IN_README for name, value in vars(module).items()}
    names |= {"backbone": backbone(), "data": range(50), "first_batches": [batch], "pyro": pyro}
    names |= {"loader": [batch | {"labels": labels} for _ in range(3)], "AdamW": torch.optim.AdamW}
    exec(compile(ours, "README.md", "exec"), names)
    before = names["guide"].loc.detach().clone()
    assert torch.isfinite(names["loss"])
    assert (names["guide"].rank_logits - guides.INITIAL_LOGIT).abs().max() > 0.05  # three steps
    exec(compile(svi, "README.md", "exec"), names | {"batch": batch, "labels": labels})
    assert not torch.equal(names["guide"].loc.detach(), before)


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert "docs/rank_and_bits.png" in links
    assert all((ROOT / link).exists() for link in links)
