"""The one gate: format, lint, types, tests. `python tools/check.py` for all, `--fix` to format and mend first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ["zmqbus", "tests", "tools", "examples"]


def run(*command: str) -> bool:
    print("$", " ".join(command), flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    paths = [name for name in CODE if (ROOT / name).exists()]
    if "--fix" in sys.argv[1:]:
        run("ruff", "format", *paths)
        run("ruff", "check", "--fix", *paths)
    steps = [
        ("ruff", "format", "--check", *paths),
        ("ruff", "check", *paths),
        ("mypy", "--strict", "-p", "zmqbus"),
        ("pytest", "-q", "-n", "3", "--dist", "loadfile"),  # most of its time is spent waiting
    ]
    failed = [" ".join(step) for step in steps if not run(*step)]
    for step in failed:
        print("failed:", step)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
