"""A process for each job: `zmqbus pull --exec`. Its exit code says what becomes of the job.

Rule 1: asked to stop, it takes no more jobs, and waits for what runs. Asked a second time, it ends what runs, and gives
those jobs back. A Ctrl-C on the terminal is for this process alone, not for those it has started.
Rule 2: a command that cannot be run at all (126 and 127, as shells have it) ends all: it is not the jobs' fault.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import subprocess
from math import inf
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from zmqbus.cli.messages.forms import value_to_json
from zmqbus.cli.shell import DATA_ERROR, remark, stopping
from zmqbus.cli.shell.bus import Watch
from zmqbus.cli.shell.output import plural, reader_has_left
from zmqbus.cli.work.settling import give_back, unconfirmed
from zmqbus.errors import SetupError
from zmqbus.net.clock import now

if TYPE_CHECKING:
    from zmqbus.node.faces.worker import Worker
    from zmqbus.node.work.queues.job import Job

PLACE = "{}"
LOOK = 0.02  # seconds between two looks for what has ended, while there is room for more
RENEW = 3  # times in each lease it is renewed
NOT_RUN = (126, 127)


class Running:
    """A job, and the process that does it."""

    def __init__(self, job: Job, process: subprocess.Popen[bytes], renew_at: float) -> None:
        self.job = job
        self.process = process
        self.renew_at = renew_at


class Runner:
    """Runs a command for each job, some at a time."""

    def __init__(self, worker: Worker, watch: Watch, command: str, processes: int, lease: float) -> None:
        self.taken = 0
        self.well = True
        """Whether it is known what became of all jobs."""
        self._done = self._failed = self._rejected = self._returned = 0
        self._worker = worker
        self._watch = watch
        self._command = command
        self._processes = processes
        self._lease = lease
        self._peek = min(stopping.PEEK, lease / RENEW / 2)  # so that it is renewed before half of it is over
        self._running: set[Running] = set()
        self._ended: SimpleQueue[Running] = SimpleQueue()
        self._stop = self._hurry = self._said = False
        self._trouble: Exception | None = None

    def run(self, count: int | None, until: float) -> None:
        """Until there were so many, it is so late, or the command is asked to stop.

        Raises:
            SetupError: the command cannot be run.
            BrokenPipeError: whoever read the output has left.
        """
        most = inf if count is None else count
        with stopping.handed_to(self._on_signal):
            while True:
                more = not self._stop and self.taken < most and now() < until
                if not more and not self._running:
                    break
                if more and len(self._running) < self._processes:
                    self._take(max(0.0, min(LOOK if self._running else stopping.PEEK, until - now())))
                    self._settle(0.0)
                else:
                    self._settle(self._peek)
                self._renew()
                self._watch.poll()
                self._look_for_signals()
        if self._trouble is not None:
            raise self._trouble

    def _on_signal(self, again: bool) -> None:
        self._stop, self._hurry = True, again

    def _look_for_signals(self) -> None:
        if self._hurry:
            stopping.check()
        if self._stop and self._running and not self._said:
            self._said = True
            remark(f"waiting for the end of what runs ({plural(len(self._running), 'job')}); Ctrl-C ends that as well")

    def _give_up(self, trouble: Exception) -> None:
        """Take no more, and raise this in the end."""
        self._stop, self._trouble = True, self._trouble or trouble

    def end(self, quiet: bool) -> None:
        """Nothing is left running; report."""
        for one in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGTERM)
            give_back(one.job)
            self._returned += 1
        unsure = unconfirmed(self._worker)
        self.well = not unsure and not self._returned
        self._watch.poll()
        facts = {"failed": self._failed, "rejected": self._rejected, "given back": self._returned}
        told = [f"{self._done:,} done", *(f"{n:,} {what}" for what, n in facts.items() if n)]
        if not quiet or len(told) > 1 or unsure:
            remark(f"{plural(self.taken, 'job')}: {', '.join(told)}{unsure}")

    # --- one job -----------------------------------------------------------------------------------

    def _take(self, timeout: float) -> None:
        job = self._worker.get(timeout)
        if job is None:
            return
        self.taken += 1
        if reader_has_left():
            give_back(job)
            self._returned += 1
            self._give_up(BrokenPipeError())
            return
        try:
            command, given = filled(self._command, job.value)
            process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
                env=os.environ | about(job),
                process_group=0,
            )
        except (ValueError, OSError) as error:
            self._no_process(job, error)
            return
        one = Running(job, process, now() + self._lease / RENEW)
        self._running.add(one)
        Thread(target=self._attend, args=(one, given), name="zmqbus job", daemon=True).start()

    def _no_process(self, job: Job, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno != errno.E2BIG:  # no memory, too many processes
            give_back(job)
            self._returned += 1
            self._give_up(error)
        else:  # it has a zero byte in it, or is too long
            job.reject(f"the value cannot be an argument ({error}): have the command read its standard input")
            self._rejected += 1

    def _attend(self, one: Running, given: bytes | None) -> None:
        one.process.communicate(given)
        self._ended.put(one)

    def _settle(self, timeout: float) -> None:
        """What has ended, or ends within this time."""
        try:
            while True:
                one = self._ended.get(timeout=timeout) if timeout else self._ended.get_nowait()
                timeout = 0.0
                self._running.discard(one)
                self._conclude(one.job, one.process.returncode)
        except Empty:
            pass

    def _conclude(self, job: Job, code: int) -> None:
        if code == 0:
            job.ack()
            self._done += 1
        elif code == DATA_ERROR:
            job.reject(f"the command exited with {code}")
            self._rejected += 1
        elif code in NOT_RUN:
            give_back(job)
            self._returned += 1
            self._give_up(SetupError(f"the command cannot be run (exit code {code}): {self._command}"))
        else:
            job.nack(reason=f"the command {_how(code)}")
            self._failed += 1

    def _renew(self) -> None:
        time = now()
        for one in self._running:
            if time >= one.renew_at:
                one.renew_at = time + self._lease / RENEW
                one.job.extend(self._lease)


def filled(command: str, value: Any) -> tuple[str, bytes | None]:
    """The command with the value in it, and what is for its standard input, if it is not."""
    if PLACE in command:
        return command.replace(
            PLACE, shlex.quote(os.fsdecode(value) if isinstance(value, bytes) else _text(value))
        ), None
    return command, value if isinstance(value, bytes) else f"{_text(value)}\n".encode()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else value_to_json(value)


def about(job: Job) -> dict[str, str]:
    """For the environment of its process."""
    identity = f"{job.origin:016x}/{job.topic}/{job.seq}"
    return {"ZMQBUS_TOPIC": job.topic, "ZMQBUS_ATTEMPT": str(job.attempt), "ZMQBUS_ID": identity}


def _how(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
