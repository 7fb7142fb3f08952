"""SIGTERM and Ctrl-C: while training, the step under way is finished, and a checkpoint written.

At other times the work ends at once, and what it had begun to write is taken away.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from bayes_lora.errors import Interrupted


class Pending:
    """A signal that has come and was not yet acted on.

    Attributes
    ----------
    signal : int or None
        Its number.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def act(self, message: str) -> None:
        """Stop, if a signal has come.

        Raises
        ------
        Interrupted
            With the name of the signal, and the message, which says how to go on.
        """
        if self.signal is not None:
            raise _stopped(self.signal, message)


@contextmanager
def held_back() -> Iterator[Pending]:
    """Hold SIGTERM and SIGINT back inside the block; the second one acts at once."""
    pending = Pending()

    def note(number: int, frame: FrameType | None) -> None:
        pending.signal = number

    with handled(note, signal.SIGTERM, signal.SIGINT):
        yield pending


@contextmanager
def at_once(message: str, *numbers: int) -> Iterator[None]:
    """Have the first of some signals raise Interrupted inside the block, with the message."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _stopped(number, message)

    with handled(stop, *numbers):
        yield


def _stopped(number: int, message: str) -> Interrupted:
    return Interrupted(f"stopped by {signal.Signals(number).name}; {message}", number)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Have the first of some signals handled inside the block; after it all are as they were.

    Only the main thread has signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, earlier in before.items():
            signal.signal(number, earlier)

    def once(number: int, frame: FrameType | None) -> None:
        restore()
        handler(number, frame)

    for number in before:
        signal.signal(number, once)
    try:
        yield
    finally:
        restore()
