"""What the README says can be typed: its commands parse, its Python runs, its files exist."""

import re
import shlex
from pathlib import Path

import pytest

from bayes_lora.inference.config import parse

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    bayes-lora finetune (.*)$", TEXT, flags=re.MULTILINE)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    assert parse(shlex.split(command)).training.output_dir


def test_the_demo_is_what_the_makefile_runs():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert COMMANDS[0] in recipe


def test_the_page_of_priors_runs():
    block = next(b for b in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "Priors(" in b)
    exec(compile(block, "README.md", "exec"), {})


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert "docs/rank_and_bits.png" in links
    assert all((ROOT / link).exists() for link in links)
