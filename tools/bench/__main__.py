"""`python tools/bench …`: makes this directory the package `bench`, then runs its command line."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.cli import main  # noqa: E402  (only now can it be found)

main(prog_name="bench")
