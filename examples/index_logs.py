"""Index log lines by a pool of workers, as many as you like: `python examples/index_logs.py index.db [bus.key]`.

What `ship_logs.py` ships goes to one of them each. Start one more when there is much to do, and kill any at any time:
what it had in hand, another does. With a forwarder on the bus lines also wait while no worker is there at all.

A line may come twice, after a crash: its id (origin, topic, seq) is the key in the table, so that it is there once.
"""

from __future__ import annotations

import sqlite3
import sys
from itertools import chain, islice

import zmqbus

GROUP = "indexers"
LINES_MAX = 500  # to a transaction, which costs a sync of the disk
WAIT = 1.0  # seconds, while there is nothing to do

Row = tuple[str, str, int, float, str]


def opened(path: str) -> sqlite3.Connection:
    """The table of lines, made if it is not there."""
    database = sqlite3.connect(path, timeout=60)  # others write to it as well
    database.execute(
        "create table if not exists lines (origin text, topic text, seq integer, time real, line text,"
        " primary key (origin, topic, seq))"
    )
    return database


def row(job: zmqbus.Job) -> Row:
    """A line as the table has it."""
    return f"{job.origin:016x}", job.topic, job.seq, job.time, str(job.value)


def taken(worker: zmqbus.Worker) -> list[zmqbus.Job]:
    """What is here to be done, as soon as there is something."""
    first = worker.get(WAIT)
    more = iter(lambda: worker.get(0), None)
    return [] if first is None else list(islice(chain([first], more), LINES_MAX))


def main() -> None:
    database = opened(sys.argv[1])
    key = sys.argv[2] if len(sys.argv) > 2 else None
    done = 0
    with zmqbus.Node("indexer", key=key) as node, node.pull("logs.>", group=GROUP) as worker:
        try:
            while True:
                jobs = taken(worker)
                with database:  # commits: only then the jobs are done
                    database.executemany("insert or ignore into lines values (?, ?, ?, ?, ?)", map(row, jobs))
                for job in jobs:
                    job.ack()
                done += len(jobs)
        except KeyboardInterrupt:
            print(f"{done} lines indexed", file=sys.stderr)


if __name__ == "__main__":
    main()
