"""Chaos: a world of producers and workers, with a forwarder or without, whose processes are killed at any instant.

    outcome = run(seed, folder, kills=100)       # in a process that has no threads and no sockets: it forks
    outcome.report.raise_if_broken()

or, as a process of its own, `python -m tests.queues.chaos FOLDER SEED KILLS`, which prints the outcome as JSON.

What processes do is in roles.py, how they are killed in tests/chaos/director.py. By its seed a world has no forwarder,
or one, or one that comes when there is work already; producers have an outbox, or not; and four workers pull what they
like, with any credit, quickly or slowly, for short leases or for long ones, and sometimes fail. Another one is given
the dead letters. After the last kill everybody comes to an end: producers when all they have pushed is done or on the
forwarder's disk, then workers when all of that is done, then the forwarder. What must hold then is said by
history_checker.py, and here:

- every process that was not killed has ended well, and none has complained on its stderr;
- no producer that closes in the end says that something remained;
- all that is known to be on the forwarder's disk is done soon, and so is all else that came there: nothing is left of
  its queues, neither then nor when it is started once more.

The schedule follows from the seed, the instants from the machine: a seed that has found something may have to be
tried a few times.
"""

from __future__ import annotations

import ctypes
import json
import secrets
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.director import FINALE, PR_SET_PDEATHSIG, Director, Ended, Role
from tests.chaos.verdict import Report
from tests.queues.history import Continued, Handled, Killed, Letter, Message, Pushed, Recorder, Stopped, load, parse
from tests.queues.history_checker import check
from tests.queues.roles import DEAD, EVERYTHING, FINISHING, OVER, SETTLING, QueueLife, World, forward, produce, work

WORKERS = 4


class Outcome(NamedTuple):
    """What came of it."""

    seed: int
    kills: Counter[str]
    """By kind of role."""
    stops: int
    leaves: int
    seconds: float
    report: Report
    complaints: list[str]
    """What came out of anybody's stderr."""


class Chaos(Director):
    """The director of such a world."""

    def __init__(self, seed: int, folder: Path) -> None:
        has_forwarder, is_late = bool(seed % 2), seed % 4 == 3
        roles = []
        if has_forwarder:
            roles.append(Role("forwarder", "forwarder", 0.3, forward, delay=2.0 if is_late else 0.0))
        for number in range(3):
            kind = "outbox" if has_forwarder and number == 2 else "producer"
            roles.append(Role(f"{kind}-{number}", kind, 0.1, partial(produce, outbox=kind == "outbox")))
        roles.append(Role("worker-0", "worker", 0.1, partial(work, pattern=EVERYTHING)))
        roles += [Role(f"worker-{number}", "worker", 0.1, work) for number in range(1, WORKERS)]
        roles.append(Role("undertaker", "worker", 0.02, partial(work, pattern=DEAD)))
        super().__init__(seed, folder, roles)
        self.world = World(folder, f"queues-{secrets.token_hex(6)}", seed, self.stage, has_forwarder)
        self._recorder = Recorder(folder / "director.jsonl")

    def life(self, role: Role) -> QueueLife:
        return QueueLife(self.world, role.name, role.lives)

    def note_kill(self, role: Role) -> None:
        self._recorder.record(Killed(role.process))

    def note_stop(self, role: Role) -> None:
        self._recorder.record(Stopped(role.process))

    def note_go_on(self, role: Role) -> None:
        self._recorder.record(Continued(role.process))

    def finish(self) -> None:
        """Everybody comes to an end, producers first."""
        self.stage.left = 1  # until the forwarder says otherwise
        self.calm(SETTLING)
        self.wait(self.of("producer", "outbox"))
        if self.world.forwarder:
            progress = Progress(self.folder)
            self.wait_until(
                lambda: not progress.lacking() and not self.stage.left,
                lambda: (
                    f"workers do not get to the end, they lack {progress.lacking()}, and {self.stage.left} are left"
                ),
                FINALE,
            )
        self.stage.act = FINISHING
        self.wait(self.of("worker"))
        self.stage.act = OVER
        self.wait(self.of("forwarder"))
        if self.world.forwarder and self.stage.left:
            raise Ended(f"{self.stage.left} messages are left on the forwarder's disk, though all were done")

    def close(self) -> None:
        super().close()
        self._recorder.close()


class Progress:
    """What has been written down so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: Counter[Path] = Counter()  # bytes
        self._pushed: set[Message] = set()
        self._handled: set[Message] = set()

    def lacking(self) -> int:
        """Messages that are on a forwarder's disk, and not done."""
        for path in self._folder.glob("*.jsonl"):
            with open(path, "rb") as file:
                file.seek(self._read[path])
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            self._read[path] += len(data)
            for line in parse(data, path.name):
                match line.event:
                    case Pushed() as e:
                        self._pushed |= {Message(e.queue, e.origin, seq) for seq in range(e.first, e.last + 1)}
                    case Handled() as e:
                        self._handled |= {Message(*job[2:]) for job in e.jobs}
                    case Letter() as e:
                        self._handled.add(e.message)
        return len(self._pushed - self._handled)


def run(seed: int, folder: Path, kills: int) -> Outcome:
    """One world. Raises Ended."""
    began = time.monotonic()
    director = Chaos(seed, folder)
    try:
        director.play(kills)
        director.finish()
    finally:
        director.close()
    report = check(load(folder.glob("*.jsonl")))
    seconds = time.monotonic() - began
    return Outcome(seed, director.kills, director.stops, director.leaves, seconds, report, director.complaints())


def main(folder: str, seed: str, kills: str) -> None:
    """The process: prints the outcome, and dies with whoever wants it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # children inherit this, until they look for it
    try:
        outcome = run(int(seed), Path(folder), int(kills))
    except Ended as error:
        report = check(load(Path(folder).glob("*.jsonl")))
        print(json.dumps({"seed": int(seed), "broken": [str(error), *map(str, report.violations[:50])]}))
        return
    facts: dict[str, Any] = {
        "seed": outcome.seed,
        "kills": outcome.kills,
        "stops": outcome.stops,
        "leaves": outcome.leaves,
        "seconds": round(outcome.seconds, 1),
        "counts": outcome.report.counts,
        "broken": [*map(str, outcome.report.violations), *outcome.complaints][:50],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
