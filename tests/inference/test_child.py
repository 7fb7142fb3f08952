"""A function in a process of its own: its errors, its death, and a signal to its parent."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bayes_lora.errors import InputError, Interrupted
from bayes_lora.inference.child import in_a_child


def _sleep(started, seconds):
    Path(started).touch()
    time.sleep(seconds)


def _refuse(message):
    raise InputError(message)


def test_what_a_process_raises_is_raised_and_its_death_told():
    with pytest.raises(InputError, match="not like this"):
        in_a_child("cell", _refuse, "not like this")
    with pytest.raises(InputError, match=r"cell: its process was killed \(exit code 3\)"):
        in_a_child("cell", os._exit, 3)


def test_sigterm_ends_the_process_too(tmp_path):
    begun = time.monotonic()
    started = tmp_path / "started"

    def terminate():
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate).start()
    with pytest.raises(Interrupted) as caught:
        in_a_child("cell", _sleep, str(started), 600)
    assert caught.value.signal == signal.SIGTERM
    assert time.monotonic() - begun < 300  # it did not sleep to its end
    assert signal.getsignal(signal.SIGTERM) == before
