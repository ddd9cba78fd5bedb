"""`zmqbus pull`: be a worker. Print jobs, or run a process for each (running.py).

What is printed is done when its line is written, whole, to its newline: that is when it is acknowledged. What was
taken and not written is given back in the end, as if it had never been here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from math import inf
from typing import TYPE_CHECKING

import click

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import Fields
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import Bus, Duration, Start, Watch, Whole, greet, messages
from zmqbus.cli.shell.output import PATIENCE, Output, plural, renderer
from zmqbus.cli.work.settling import give_back, unconfirmed
from zmqbus.net.clock import now
from zmqbus.protocol.message import Message

if TYPE_CHECKING:
    from zmqbus.node.faces.worker import Worker
    from zmqbus.node.work.queues.job import Job

PROCESSES_MAX = 1000
LEASE_MIN = 0.1


class Printer:
    """Prints jobs, and acknowledges what is printed."""

    def __init__(self, worker: Worker, watch: Watch) -> None:
        self.taken = 0
        self.well = True
        """Whether all that was taken is done, and known to be."""
        self._worker = worker
        self._watch = watch
        self._output = Output()
        self._pending: deque[Job] = deque()  # on their way to the output
        self._done = 0

    def run(self, render: Callable[[Fields], str], count: int | None, until: float) -> None:
        """Until there were so many, or it is so late."""
        for job, at in messages(self._take, until, self._pause):
            self.taken += 1
            self._pending.append(job)
            message = Message(job.topic, job.value, job.seq, job.origin, job.time, job.headers)
            fields = Fields(message, now=at, node=self._watch.name(job.origin), attempt=job.attempt)
            self._output.put(render(fields))
            if self.taken == count:
                return

    def end(self, quiet: bool) -> None:
        """Let out the rest, and report."""
        self._output.flush(PATIENCE)
        self._acknowledge()
        unsure = unconfirmed(self._worker)
        text = f"{plural(self._done, 'job')} printed"
        if self._pending:
            text += f", {len(self._pending):,} given back"
        for job in self._pending:
            give_back(job)
        self.well = not unsure and not self._pending
        self._watch.poll()
        if not quiet or not self.well:
            remark(f"{text}{unsure}")

    def _take(self, timeout: float) -> Sequence[Job]:
        job = self._worker.get(timeout)
        return () if job is None else (job,)

    def _pause(self) -> None:
        self._output.flush()
        self._acknowledge()
        self._watch.poll()

    def _acknowledge(self) -> None:
        shown = self._output.shown
        while self._done < shown:
            self._pending.popleft().ack()
            self._done += 1


@click.command()
@click.argument("queue")
@click.option("--group", metavar="NAME", default="workers", show_default=True, help="The group to be a member of.")
@click.option(
    "--exec",
    "command",
    metavar="COMMAND",
    help="Run this for each job, in a shell: {} is its value, as one word; without {} the value is on standard input.",
)
@click.option("--jobs", "processes", type=Whole(1, PROCESSES_MAX), metavar="N", help="Run N at a time. Default: 1.")
@click.option(
    "--credit",
    type=Whole(1, 1_000_000),
    metavar="N",
    help="Jobs to have here at a time. Default: what is done in a moment; with --exec, those that run.",
)
@click.option(
    "--lease",
    type=Duration(LEASE_MIN),
    default="30s",
    show_default=True,
    metavar="DURATION",
    help="When nothing is heard of a job for so long, another worker gets it.",
)
@click.option("-n", "--count", type=Whole(1), metavar="N", help="End after N jobs.")
@click.option("--for", "seconds", type=Duration(), help="End after this time, such as 10s or 1h30m.")
@click.option(
    "--start",
    type=Start(),
    metavar="WHERE",
    help="Where a group that is new begins in the forwarders' logs: first, -1h, a time, or an offset. Default: here.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("-F", "--format", "template", metavar="TEMPLATE", help="Such as '{topic} {value.status} {attempt}'.")
@click.option("-q", "--quiet", is_flag=True, help="No report at the end, unless something went wrong.")
@click.pass_obj
def pull(
    bus: Bus,
    queue: str,
    group: str,
    command: str | None,
    processes: int | None,
    credit: int | None,
    lease: float,
    count: int | None,
    seconds: float | None,
    start: str | int | datetime | None,
    as_json: bool,
    template: str | None,
    quiet: bool,
) -> int:
    """Be a worker of a queue: print its jobs, or run a command for each.

    QUEUE is a topic or a pattern. What is pushed there goes to one worker of all; what is published there, to one of
    each group. A job is done when it is printed, or when its command exits with 0; when that exits with 65, it becomes
    a dead letter, and otherwise it is tried again, later.

    \b
    Examples:
      zmqbus pull jobs.mail --json -n 1
      zmqbus pull jobs.resize --exec 'convert {} -resize 200x small/{}' --jobs 4
      zmqbus pull 'logs.>' --group indexers --exec ./index
    """
    if command is not None and (as_json or template is not None):
        raise click.UsageError("with --exec nothing is printed but by the command: leave out --json and --format")
    if command is None and processes is not None:
        raise click.UsageError("--jobs is of processes: it goes with --exec")
    render = renderer(template, as_json)
    until = inf if seconds is None else now() + seconds
    with bus.join("pull") as (node, watch):
        held = credit if command is None else credit or processes or 1
        with node.pull(queue, group=group, credit=held, lease=lease, start=start) as worker:
            greet([queue], bus)
            if command is not None:
                from zmqbus.cli.work.running import Runner

                runner = Runner(worker, watch, command, processes or 1, lease)
                try:
                    runner.run(count, until)
                finally:
                    runner.end(quiet)
                taken, well = runner.taken, runner.well
            else:
                printer = Printer(worker, watch)
                try:
                    printer.run(render, count, until)
                finally:
                    printer.end(quiet)
                taken, well = printer.taken, printer.well
    short = count is not None and taken < count
    return shell.TIMED_OUT if short or not well else shell.OK
