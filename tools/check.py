"""The one gate: format, lint, types, tests. `python tools/check.py` for all, `--fix` to format and mend first.

Thousands of tests with real sockets, processes and clocks share a few cores with whatever else the machine does, and
now and then one of them is late for it. So the few that fail are run once more, alone and in plain sight:
what fails again has failed, and so has a run in which many did. `pytest` itself repeats nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ["zmqbus", "tests", "tools", "examples"]
TESTS = ("pytest", "-q", "-n", "3", "--dist", "loadfile")  # most of its time is spent waiting
LATE = 3
"""So many tests may have been late; more that fail are no accident."""


def run(*command: str) -> int:
    """The exit code."""
    print("$", " ".join(command), flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode


def tests_pass() -> bool:
    code = run(*TESTS)
    if code != 1:  # 1: tests failed; what is more than 1 is no verdict on them
        return code == 0
    failed = list(json.loads((ROOT / ".pytest_cache/v/cache/lastfailed").read_text()))
    if len(failed) > LATE or run("pytest", "-q", *failed) != 0:
        return False
    print("failed beside the others (see above), passed alone:", *failed)
    return True


def main() -> int:
    paths = [name for name in CODE if (ROOT / name).exists()]
    if "--fix" in sys.argv[1:]:
        run("ruff", "format", *paths)
        run("ruff", "check", "--fix", *paths)
    steps = [
        ("ruff", "format", "--check", *paths),
        ("ruff", "check", *paths),
        ("mypy", "--strict", "-p", "zmqbus"),
    ]
    failed = [step for step in steps if run(*step) != 0]
    if not tests_pass():
        failed.append(TESTS)
    for step in failed:
        print("failed:", " ".join(step))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
