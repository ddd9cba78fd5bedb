"""The inside of a worker process: runs one task, and talks to the parent in lines of JSON on stdin and stdout.

Started by crew.py as `python -m bench.child MODULE:FUNCTION LIMIT_S ARGUMENTS`. A task is a function
`task(parent, **arguments)`. Imports as little as it can: it is part of what `idle` measures.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import select
import sys
import traceback
from typing import Any


class Parent:
    """The process that started this one."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what a library may print is no message to the parent
        self._received = b""

    def tell(self, **facts: Any) -> None:
        """Report."""
        self._out.write(json.dumps(facts) + "\n")

    def hear(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next order; None when there is none within `timeout` seconds. Exits when the parent is gone."""
        while b"\n" not in self._received:
            if not select.select([0], [], [], timeout)[0]:
                return None
            data = os.read(0, 65536)
            if not data:
                sys.exit(0)
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        order: dict[str, Any] = json.loads(line)
        return order


def cpu_s() -> float:
    """CPU seconds that this process has used, all its threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rss_bytes() -> int:
    """Resident memory of this process now (where the system does not tell: at its most)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the task that the command line names."""
    task, limit_s, arguments = sys.argv[1:]
    # Whatever happens to the parent, no worker outlives its limit; and it tells where it hung.
    faulthandler.dump_traceback_later(float(limit_s), exit=True)
    parent = Parent()
    try:
        module, _, name = task.partition(":")
        getattr(importlib.import_module(module), name)(parent, **json.loads(arguments))
    except Exception as error:
        traceback.print_exc()
        parent.tell(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
