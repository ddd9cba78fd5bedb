"""The one who starts the processes of the demo, tells them what to do, listens to them, and kills some.

Each process is a member of the crew, with one node (members.py, storing.py). It reports facts over a pipe, as dicts,
and is told what to do next, as tuples.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from zmqbus.cli.demo.members import REPORT
from zmqbus.cli.shell.stopping import check
from zmqbus.errors import SetupError, WaitTimeout
from zmqbus.net.clock import now

PRELOADED = [
    "zmqbus.cli.demo.storing",
    "zmqbus.cli.demo.sharing",
    "zmqbus.node.faces.node",
    "zmqbus.forwarder.forwarder",
]


class Actor:
    """One process of the crew, and what it has reported."""

    def __init__(self, name: str, process: Any, pipe: Connection) -> None:
        self.name = name
        self.process = process
        self.pipe = pipe
        self.facts: dict[str, Any] = {}
        self.state = ""
        self.gone = False


class Crew:
    """Starts processes, tells them what to do, and listens; `redraw` is called now and then."""

    def __init__(self, redraw: Callable[[], None]) -> None:
        # Children of a server that has imported everything once start in milliseconds, and inherit no threads.
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        resource_tracker.ensure_running()  # which would let signals through again
        # Ctrl-C, which a terminal sends to all, is our business alone; they inherit this.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._redraw = redraw
        self.actors: list[Actor] = []
        self.journal_start = 0
        """The offset of the journal at which the demo begins."""

    def start(self, work: Callable[..., None], bus: str, name: str, *arguments: object) -> Actor:
        """A new process."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, bus, name, *arguments), name=name, daemon=True)
        process.start()
        theirs.close()
        actor = Actor(name, process, ours)
        self.actors.append(actor)
        return actor

    def kill(self, actor: Actor) -> None:
        """kill -9. What it has reported until then is still taken in."""
        actor.process.kill()
        actor.process.join()
        with contextlib.suppress(EOFError, OSError):  # in the middle of a report, perhaps
            while True:
                actor.facts |= actor.pipe.recv()
        actor.pipe.close()
        actor.gone = True

    def tell(self, actors: Sequence[Actor], *command: object) -> None:
        """Have them do something."""
        for actor in actors:
            actor.pipe.send(command)

    def listen(self, seconds: float) -> None:
        """Take in facts for so long."""
        until = now() + seconds
        while (rest := until - now()) > 0:
            self._take_in(rest)

    def until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Take in facts until this is so. False: it was not within `timeout` seconds."""
        until = now() + timeout
        while not condition() and now() < until:
            self._take_in(REPORT)
        return condition()

    def ask(self, actors: Sequence[Actor], question: str, timeout: float) -> list[Any]:
        """What they answer now."""
        for actor in actors:
            actor.facts.pop(question, None)
        self.tell(actors, question)
        self.expect(actors, question, timeout)
        return [actor.facts[question] for actor in actors]

    def expect(self, actors: Sequence[Actor], fact: str, timeout: float) -> None:
        """Take in facts until all of them have reported this one."""
        until = now() + timeout
        while missing := [actor for actor in actors if fact not in actor.facts]:
            if now() >= until:
                raise WaitTimeout(f"processes to report {fact!r}", len(actors) - len(missing), len(actors), timeout)
            self._take_in(until - now())

    def _take_in(self, timeout: float) -> None:
        check()
        pipes = {actor.pipe: actor for actor in self.actors if not actor.gone}
        for pipe in wait(list(pipes), min(timeout, REPORT)):
            assert isinstance(pipe, Connection)
            actor = pipes[pipe]
            try:
                actor.facts |= pipe.recv()
            except (EOFError, ConnectionError):
                raise SetupError(f"{actor.name} ended unexpectedly") from None
            if "failed" in actor.facts:
                raise SetupError(f"{actor.name}: {actor.facts['failed']}")
        self._redraw()

    def end(self) -> None:
        """No process is left behind, also not a stopped one."""
        for actor in self.actors:
            actor.pipe.close()
            actor.process.kill()
        for actor in self.actors:
            actor.process.join(5)
