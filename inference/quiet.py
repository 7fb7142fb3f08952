"""What the libraries print beside ours."""

from __future__ import annotations

import sys
import warnings

import datasets
import transformers


def quiet() -> None:
    """Leave to the libraries' messages only what a user of a command can do something about."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Encountered NaN")  # reported as an error, once
    # names that older versions of accelerate and transformers still need
    for name in ("broadcast_buffers", "gradient_checkpointing_enable"):
        warnings.filterwarnings("ignore", message=f"`{name}` is deprecated")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
