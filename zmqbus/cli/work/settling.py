"""What becomes of jobs that a command has taken: given back, or known to be done."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from zmqbus.cli.shell import stopping
from zmqbus.errors import NotSettled

if TYPE_CHECKING:
    from zmqbus.node.faces.worker import Worker
    from zmqbus.node.work.queues.job import Job

CONFIRM = 5.0  # seconds that owners have to confirm what is done
CONFIRM_STOPPED = 1.0  # … when asked to stop


class NotBegun(BaseException):
    """Ends the block of a job that was not begun, which does not count as an attempt."""


def give_back(job: Job) -> None:
    """To be done by somebody else, at once."""
    with contextlib.suppress(NotBegun), job:
        raise NotBegun


def unconfirmed(worker: Worker) -> str:
    """Wait until the owners know what is done. Returns what there is to say if they do not tell."""
    try:
        worker.flush(CONFIRM_STOPPED if stopping.asked() else CONFIRM)
    except NotSettled as error:
        return f"; {error.unsettled:,} not confirmed by their owners, and perhaps done once more"
    return ""
