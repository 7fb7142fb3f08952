"""Errors that a user can cause and mend; the command line prints them as one line."""

from __future__ import annotations


class InputError(ValueError):
    """Raised when something given from outside is wrong; the message says what to do (exit code 2)."""


class NumericalError(ArithmeticError):
    """Raised when training leaves the finite numbers; the message names the term (exit code 1)."""
