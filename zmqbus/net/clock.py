"""The one place that reads clocks. Durations come from the monotonic clock, timestamps from the wall clock.

`give_way` lets a thread run that was woken just now. It needs the interpreter's lock, which whoever woke it holds: it
would only come to wait for that, and have to be woken once more; and it may have been put on the same processor. Python
alone would hand over to it when whoever woke it sleeps.
"""

import os
from time import monotonic as now
from time import sleep, time_ns

__all__ = ["give_way", "now", "sleep", "time_ns"]


def give_way() -> None:
    """Let other threads run, if any can. Costs a microsecond if none can."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:  # not POSIX
        sleep(0)
