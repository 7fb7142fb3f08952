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
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate's
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
