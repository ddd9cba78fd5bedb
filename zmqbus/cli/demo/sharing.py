"""The workers of the demo share the lines of the log: each line is done by one of them. One is slow, one is killed.

What a worker has done must be known also of one that was killed. So it writes an index, as the durable consumer does
(storing.py), one line for each before it acknowledges that. They report over pipes and are told what to do as in
members.py: ("finish",).
"""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection
from pathlib import Path

from zmqbus.cli.demo.members import REPORT, member
from zmqbus.cli.demo.storing import CLAIMS
from zmqbus.net.clock import now, sleep

GROUP = "workers"
SLOW = 0.005  # seconds that the slow one takes for a line


def share(pipe: Connection, bus: str, name: str, path: Path, start: int, takes: float) -> None:
    """Do what comes, from an offset of the log on, until told to finish. Each line takes so many seconds."""
    with (
        member(pipe, bus, name) as node,
        open(path, "ab", buffering=0) as file,
        node.pull(CLAIMS, group=GROUP, start=start) as worker,
    ):
        prefixes: dict[tuple[str, int], bytes] = {}
        done = again = 0
        report_at = 0.0
        while not pipe.poll():
            job = worker.get(REPORT / 2)
            while job is not None:
                if takes:
                    sleep(takes)
                key = (job.topic, job.origin)
                prefix = prefixes.get(key)
                if prefix is None:
                    prefix = prefixes[key] = f"{job.topic} {job.origin:x} ".encode()
                file.write(b"%b%d\n" % (prefix, job.seq))
                job.ack()
                done += 1
                again += job.attempt > 1
                if now() >= report_at:
                    break
                job = worker.get(0)
            if now() >= report_at:
                report_at = now() + REPORT
                pipe.send({"done": done, "again": again})
        pipe.recv()
        worker.close()
        pipe.send({"done": done, "again": again, "finished": True})
        with contextlib.suppress(EOFError):
            pipe.recv()
