"""The workers of the demo share the lines of the log: each line is done by one of them. One is slow, one is killed.

What a worker has done must be known also of one that was killed. So it writes an index, as the durable consumer does
(storing.py), a line for each before it acknowledges that. They report over pipes and are told what to do as in
members.py: ("finish",).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from zmqbus.cli.demo.members import REPORT, member
from zmqbus.net.clock import now, sleep

if TYPE_CHECKING:
    from zmqbus.node.faces.worker import Worker
    from zmqbus.node.work.queues.job import Job

GROUP = "workers"
SLOW = 0.005  # seconds that the slow one takes for a line
LINES = 100  # that the others deal with at a time


def share(
    pipe: Connection, bus: str, name: str, topic: str, path: Path, start: int, takes: float, stuck_at: float
) -> None:
    """Do what comes of one topic, from an offset of the log on, until told to finish.

    Each line takes so many seconds. After so many lines it gets stuck, with more of them in hand.
    """
    most = 1 if takes else LINES
    with (
        member(pipe, bus, name) as node,
        open(path, "ab", buffering=0) as file,
        node.pull(topic, group=GROUP, start=start) as worker,
    ):
        done = again = 0
        report_at = 0.0
        while not pipe.poll():
            jobs = list(_some(worker, most))
            if jobs and done >= stuck_at:
                pipe.send({"done": done, "again": again, "in_hand": len(jobs)})
                pipe.recv()  # it is killed here
            sleep(takes * len(jobs))
            file.write(b"".join(b"%b %x %d\n" % (job.topic.encode(), job.origin, job.seq) for job in jobs))
            for job in jobs:
                job.ack()
                again += job.attempt > 1
            done += len(jobs)
            if now() >= report_at:
                report_at = now() + REPORT
                pipe.send({"done": done, "again": again})
        pipe.recv()
        worker.close()
        pipe.send({"done": done, "again": again, "finished": True})
        with contextlib.suppress(EOFError):
            pipe.recv()


def _some(worker: Worker, most: int) -> Iterator[Job]:
    """What is here, as soon as there is something."""
    job = worker.get(REPORT / 2)
    while job is not None:
        yield job
        most -= 1
        job = worker.get(0) if most else None
