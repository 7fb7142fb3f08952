"""What the libraries print beside ours."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import datasets
import transformers

_with_source = warnings.formatwarning


def quiet() -> None:
    """Leave to the libraries' messages only what a user of a command can do something about."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.formatwarning = _in_a_line
    warnings.filterwarnings("ignore", message="Encountered NaN")  # reported as an error, once
    # names that older versions of accelerate and transformers still need
    for name in ("broadcast_buffers", "gradient_checkpointing_enable"):
        warnings.filterwarnings("ignore", message=f"`{name}` is deprecated")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _in_a_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Our own warnings are for who runs the command, and do without their place in the source."""
    if Path(filename).parent == Path(__file__).parent and category is UserWarning:
        return f"bayes-lora: {message}\n"
    return _with_source(message, category, filename, lineno, line)
