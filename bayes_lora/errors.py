"""Errors that a user can cause and mend; the command line prints them as one line."""

from __future__ import annotations


class InputError(ValueError):
    """Something given from outside is wrong; the message says what to do (exit code 2)."""


class NumericalError(ArithmeticError):
    """Training left the finite numbers; the message names step and term (exit code 1)."""
