"""Killed at random moments, a training loses nothing behind its last checkpoint."""

import multiprocessing
import shutil
import signal

import numpy as np

from bayes_lora.inference.checkpoint import found
from bayes_lora.inference.cli import main

KILLS = 20


def test_killed_at_random_moments(small_run, tmp_path, same):
    """Whatever a process does when it is killed, the next one goes on from the last checkpoint."""
    small = small_run | {"rank": 3, "batch_size": 20, "draws": 2, "save_steps": 1}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["bayes_lora.inference.finetune"])

    def train(name, seconds=None):
        """Train in a process of its own, which is killed after so many seconds."""
        words = ["finetune", "--resume", "--output_dir", str(tmp_path / name), *options]
        process = server.Process(target=main, args=(words,))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    assert train("whole") is not None
    moments = np.random.default_rng(0)
    kills = last = 0
    while kills < KILLS:
        if train("run", moments.uniform(0.5, 2.5)) == -signal.SIGKILL:
            kills += 1
            reached = [int(path.name[5:]) for path in found(tmp_path / "run" / "checkpoints")]
            assert max(reached, default=0) >= last
            last = max(reached, default=0)
        else:  # finished before: that is no kill
            same(tmp_path / "run", tmp_path / "whole")
            shutil.rmtree(tmp_path / "run")
            last = 0
    train("run")
    same(tmp_path / "run", tmp_path / "whole")
