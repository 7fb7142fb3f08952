"""Type-check the three folders under the names they are installed as.

`models/` and `inference/` are imported as `bayes_lora.models` and `bayes_lora.inference`.
An editable install does that by an import hook, which mypy cannot see: it would find no module of
these names. So this lays the folders out, by symbolic links, as a wheel would install them, runs
mypy there, and prints its messages with the paths of the sources. More arguments go to mypy.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".mypy_cache"
TREE = CACHE / "installed"  # always the same place, or mypy's cache would be of no use
SUBPACKAGES = ("models", "inference")


def lay_out() -> None:
    """Make `TREE/bayes_lora` a package of links to the sources."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "bayes_lora"
    package.mkdir(parents=True)
    for source in (ROOT / "bayes_lora").iterdir():
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    for name in SUBPACKAGES:
        (package / name).symlink_to(ROOT / name)


def main(arguments: list[str]) -> int:
    """Run mypy on the laid-out package; the exit code is mypy's."""
    lay_out()
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*mypy, "--cache-dir", str(CACHE), *arguments, "-p", "bayes_lora"],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=False,
    )
    inside = rf"^bayes_lora/(?=(?:{'|'.join(SUBPACKAGES)})/)"
    sys.stdout.write(re.sub(inside, "", done.stdout, flags=re.MULTILINE))
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
