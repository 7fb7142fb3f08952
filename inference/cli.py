"""The command `bayes-lora`: one subcommand a script."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from bayes_lora.errors import InputError, Interrupted, NumericalError
from bayes_lora.inference.signals import at_once

COMMANDS = {
    "finetune": "finetune",
    "diagnose": "diagnose",
    "decide": "decide",
    "export": "export",
    "predict": "predict_file",
    "costs": "costs",
    "frontier": "frontier",
    "compare": "compare",
}
"""Modules beside this one; each has a function `run`, and heavy imports, so only one is loaded."""

FULL = (errno.ENOSPC, errno.EDQUOT)
ADVICE = {
    **dict.fromkeys(FULL, "free some, and go on"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions, or name another"
    ),
    errno.ENAMETOOLONG: "name a shorter one",
    errno.EIO: "the disk does not read or write it",
}
"""What a disk refuses, which is no fault of the program, and what to do."""

USAGE = """usage: bayes-lora COMMAND [--help] ...

commands:
  finetune   fine-tune a transformer; rank and bits of its adapters are inferred by SVI
  diagnose   how sure the posterior of a run is, and whether to believe it: text and report.html
  decide     ranks and bits of a finished run anew, under a budget, without training
  export     a finished run for PEFT, for transformers, or packed in its own bits
  predict    the rows of a file, with what data and posterior leave open
  costs      what a network of any size would cost, from its configuration alone
  frontier   score against bit operations, over several prices
  compare    methods, tasks and seeds: LoRA, AdaLoRA and others beside Bayesian LoRA"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are of wrong input, as any other."""

    def error(self, message: str) -> NoReturn:
        """Raise an InputError."""
        raise InputError(message)


def report_errors(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; turn what a user can mend into one line on standard error.

    Returns
    -------
    int
        Exit code: 0, 2 for wrong input or what a disk refuses, 1 for a numerical failure,
        128 and the signal's number if one stopped it: 130 for Ctrl-C, 143 for SIGTERM, 141 if who
        reads its output has gone.
    """
    try:
        with at_once("no file is half written", signal.SIGTERM):
            command(arguments)
        sys.stdout.flush()
    except InputError as error:
        print(f"bayes-lora: error: {error}", file=sys.stderr)
        return 2
    except NumericalError as error:
        print(f"bayes-lora: numerical failure: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who read the output, as `head` does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in ADVICE or (error.errno not in FULL and error.filename is None):
            raise
        where = "" if error.filename is None else f", {error.filename}"
        advice = ADVICE[error.errno]
        print(f"bayes-lora: error: {error.strerror}{where}: {advice}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"bayes-lora: {error.message}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("bayes-lora: interrupted", file=sys.stderr)
        return 130
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the command line names, and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(
            f"bayes-lora: error: no command {arguments[0]!r}; there is {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    module = f"bayes_lora.inference.{COMMANDS[arguments[0]]}"
    return report_errors(lambda words: import_module(module).run(words), arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
