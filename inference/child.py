"""A function in a process of its own: with memory of its own, and with no others to meet."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from bayes_lora.errors import InputError, Interrupted
from bayes_lora.inference.signals import at_once

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a launcher tells a process of the others."""

STOPPED = "what is finished is kept, and the same command goes on (that of finetune with --resume)"


def in_a_child(name: object, function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a new process, which SIGTERM to this one stops as well.

    Parameters
    ----------
    name : object
        What to call the work in an error message.
    function, *arguments
        Must be picklable. What the function returns is lost.

    Raises
    ------
    InputError
        If the process was killed; or whatever the function raises.
    Interrupted
        If SIGTERM came.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_report, args=(sender, function, *arguments))
    try:
        with at_once(STOPPED, signal.SIGTERM):
            process.start()
            sender.close()
            error = receiver.recv()
    except Interrupted:
        process.terminate()  # what it trains leaves a checkpoint
        raise
    except EOFError:
        process.join()
        raise InputError(
            f"{name}: its process was killed (exit code {process.exitcode}), perhaps for memory: "
            "the same command goes on; a smaller --batch_size takes less"
        ) from None
    finally:  # on Ctrl-C it has had its own
        process.join()
    if error is not None:
        raise error


def _report(sender: Connection, function: Callable[..., object], *arguments: object) -> None:
    """In the process: what the function raises, or None."""
    launched = {name: os.environ.pop(name) for name in GROUP if name in os.environ}
    if "LOCAL_RANK" in launched and torch.cuda.is_available():
        torch.cuda.set_device(int(launched["LOCAL_RANK"]))
    try:
        function(*arguments)
    except (Exception, Interrupted) as error:
        sender.send(error)
    else:
        sender.send(None)
