"""Errors that a user can cause and mend; the command line prints them as one line."""

from __future__ import annotations


class InputError(ValueError):
    r"""Something given from outside is wrong; the message says what to do (exit code 2).

    Parameters
    ----------
    message : str
        One line; a control character that came from outside is shown escaped.

    Examples
    --------
    >>> print(InputError("unknown option \x1b[31m"))
    unknown option \x1b[31m
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def one_line(error: Exception) -> str:
    r"""What another library says of an error, short enough to be quoted in a message.

    Examples
    --------
    >>> one_line(OSError("no such file:\n  a.txt"))
    'no such file: a.txt'
    """
    return " ".join(str(error).split())[:200]


class NumericalError(ArithmeticError):
    """Training left the finite numbers; the message names step and term (exit code 1)."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work where it can go on; the message says how (exit code 128 + signal).

    As Ctrl-C's own, it is no `Exception`: it passes whoever goes on after those.

    Parameters
    ----------
    message : str
        What was stopped, and how to go on.
    signal : int
        Number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.message, self.signal = message, signal
