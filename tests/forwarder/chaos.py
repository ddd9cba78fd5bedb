"""Chaos: a world of forwarders, publishers and durable consumers, in which processes are killed at any instant.

    outcome = run(seed, folder, kills=100)       # in a process that has no threads and no sockets: it forks
    outcome.report.raise_if_broken()

or, as a process of its own, `python -m tests.forwarder.chaos FOLDER SEED KILLS`, which prints the outcome
as JSON.

The **director** forks a process for each role (chaos_roles.py), and then, as its seed has it, kills them with -9, one
after the other, and starts them anew on what they have left on their disks: at once, or after a while; often again
before they are up; stopped ones as well. Now and then one kills itself, the moment it was told something. Some are only
stopped, for a moment or for so long that all others take them for lost, and some are told to leave in good order. After
the last kill everybody comes to an end: publishers when all they have published is durable and their outboxes are
empty, then consumers when they have read all there is, then forwarders. What must hold then is said by
history_checker.py, and here:

- every process that was not killed has ended well, and none has complained on its stderr;
- all that is journaled, on topics that a consumer wants, has been given to it.

Of two forwarders, each has its own topics, or both have all, and publishers want their messages on both. Each journal
is judged as a history of its own. Of a message that is in both, nobody can tell which one a consumer was given it from:
there it is only asked whether it was given.

The schedule follows from the seed, the instants from the machine: a seed that has found something may have to be
tried a few times.
"""

from __future__ import annotations

import ctypes
import heapq
import json
import os
import secrets
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from chaos_roles import (
    CONSUMING,
    FINALE,
    OVER,
    PUBLISHING,
    STORING,
    Life,
    Stage,
    World,
    consume,
    digest_of,
    publish,
    store,
)
from history import Acked, Committed, Consumed, Failed, Journaled, Killed, Line, Opened, Recorder, Sent, load, parse
from history_checker import Report, check

from tests.forwarder.forwarders import stored
from zmqbus.protocol.topics import Matcher

PR_SET_PDEATHSIG = 1
EVERYTHING = {"forwarder": [">"]}
SHARED = {"logs": ["logs.>"], "metrics": ["metrics.>"]}
TWINS = {"one": [">"], "two": [">"]}
CURSORS = {"indexer": [">"], "archive": ["logs.*", "metrics.cpu"]}
STEP = 0.18  # seconds between two deeds of the director, on average
LOST = 6.5  # seconds after which everybody takes a silent node for lost
YOUNG = 0.3  # seconds: a process of this age may not have opened its node yet, or not have met the others


class Role:
    """One place in the world, and the process that fills it now."""

    def __init__(self, name: str, kind: str, weight: float, work: Callable[[Life], None]) -> None:
        self.name, self.kind, self.weight, self.work = name, kind, weight, work
        self.lives = 0
        self.pid = 0
        self.stopped = self.leaving = False


class Outcome(NamedTuple):
    """What came of it."""

    seed: int
    kills: Counter[str]
    """By kind of role."""
    stops: int
    leaves: int
    seconds: float
    reports: dict[str, Report]
    """By journal."""
    complaints: list[str]
    """What came out of anybody's stderr."""


class Ended(AssertionError):
    """A process ended that was not told to, or did not when it was."""


class Director:
    """Forks, kills, and waits."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.rng = Random(seed)
        claims = (EVERYTHING, SHARED, TWINS)[seed % 3]
        self.world = World(folder, f"chaos-{secrets.token_hex(6)}", seed, claims, claims is TWINS, Stage())
        self.stage = self.world.stage
        self.roles = [Role(name, "forwarder", 0.35 / len(claims), store) for name in claims]
        for number in range(4):
            kind = "outbox" if number % 2 else "publisher"
            work = partial(publish, outbox=bool(number % 2))
            self.roles.append(Role(f"{kind}-{number}", kind, 0.1, work))
        for cursor, patterns in CURSORS.items():
            for rival in (False, True):
                work = partial(consume, cursor=cursor, patterns=patterns, rival=rival)
                self.roles.append(Role(f"{cursor}{'-rival' * rival}", "consumer", 0.06, work))
        self.kills: Counter[str] = Counter()
        self.stops = self.leaves = 0
        self._recorder = Recorder(folder / "director.jsonl")
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = 0

    # --- processes -----------------------------------------------------------------------------------

    def start(self, role: Role) -> None:
        """A new life."""
        if role.pid:
            return
        role.lives += 1
        role.leaving = False
        life = Life(self.world, role.name, role.lives)
        parent = os.getpid()
        role.pid = os.fork()
        if role.pid == 0:
            code = 1
            try:
                os.dup2(os.open(self.path(role, "stderr"), os.O_WRONLY | os.O_CREAT, 0o600), 2)
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == parent:
                    life.begin()
                    role.work(life)
                    code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def path(self, role: Role, suffix: str) -> Path:
        """Of a file of its present life."""
        return self.world.folder / f"{role.name}-{role.lives:04}.{suffix}"

    def kill(self, role: Role) -> None:
        """kill -9, and reap it."""
        if role.pid:
            self.look(role)
        if role.pid:
            self._recorder.record(Killed(role.name))
            os.kill(role.pid, signal.SIGKILL)
            os.waitpid(role.pid, 0)
            role.pid, role.stopped = 0, False
            self.kills[role.kind] += 1

    def look(self, role: Role) -> bool:
        """Whether it still runs. Raises Ended, if it has ended badly."""
        if role.pid:
            pid, status = os.waitpid(role.pid, os.WNOHANG)
            if pid:
                role.pid = 0
                if status == signal.SIGKILL:  # by its own hand
                    self.kills[role.kind] += 1
                    if self.stage.act == PUBLISHING:
                        self.later(0.05, partial(self.start, role))
                    else:
                        self.start(role)
                elif status:
                    reason = self.path(role, "stderr").read_text()
                    raise Ended(f"{role.name}, life {role.lives}, has ended with status {status}: {reason}")
        return bool(role.pid)

    def stop(self, role: Role, seconds: float) -> None:
        """In its tracks, and let it go on later, if it still lives then."""
        if role.pid and not role.stopped and self.look(role):
            role.stopped = True
            self.stops += 1
            os.kill(role.pid, signal.SIGSTOP)
            self.later(seconds, partial(self.go_on, role, role.lives))

    def go_on(self, role: Role, life: int) -> None:
        if role.stopped and role.lives == life:
            role.stopped = False
            os.kill(role.pid, signal.SIGCONT)

    def leave(self, role: Role) -> None:
        """Have it end in good order."""
        if role.pid and not role.stopped and self.look(role):
            self.leaves += 1
            role.leaving = True
            os.kill(role.pid, signal.SIGTERM)
            self.later(0.2, partial(self.return_, role, role.lives))

    def return_(self, role: Role, life: int) -> None:
        """Start it again once it has left; what has happened to it meanwhile has been seen to."""
        if role.lives == life and not role.stopped:
            if self.look(role):
                self.later(0.2, partial(self.return_, role, life))
            else:
                self.start(role)

    # --- the schedule --------------------------------------------------------------------------------

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._numbers, work))

    def step(self) -> None:
        """One deed; and see to the next."""
        rng = self.rng
        self.later(rng.expovariate(1 / STEP), self.step)
        for role in self.roles:
            self.look(role)
        (role,) = rng.choices(self.roles, [each.weight for each in self.roles])
        deed, seconds, age = rng.random(), rng.random(), rng.uniform(0, YOUNG)
        if deed < 0.15:
            self.stop(role, 1.5 * seconds)
        elif deed < 0.16:
            self.stop(role, LOST)
        elif deed < 0.2:
            self.leave(role)
        elif deed < 0.35:  # gone for a while
            self.kill(role)
            self.later(seconds, partial(self.start, role))
        else:
            self.kill(role)
            self.start(role)
            if deed < 0.6:  # and killed again before it is up
                self.later(age, partial(self.kill, role))
                self.later(age, partial(self.start, role))

    def play(self, kills: int) -> None:
        """Until so many have been killed."""
        for role in self.roles:
            self.start(role)
        self.later(0.5, self.step)
        while self.kills.total() < kills:
            at, _, work = heapq.heappop(self._due)
            time.sleep(max(0.0, at - time.monotonic()))
            work()
        for role in self.roles:
            self.go_on(role, role.lives)

    def finish(self) -> None:
        """Everybody comes to an end, publishers first."""
        self.stage.act = CONSUMING
        leaving = [role for role in self.roles if role.leaving]
        for role in self.roles:
            if role not in leaving and not self.look(role):
                self.start(role)
        self.wait(leaving)
        for role in leaving:
            self.start(role)
        self.wait(self.of("publisher", "outbox"))
        given = Given(self.world.folder)
        wanted = wishes(self.world)
        deadline = time.monotonic() + FINALE
        while lacking := {cursor: len(messages - given.to(cursor)) for cursor, messages in wanted.items()}:
            if not any(lacking.values()):
                break
            if time.monotonic() > deadline:
                raise Ended(f"consumers do not get to the end, they lack: {lacking}")
            for role in self.roles:
                self.look(role)
            time.sleep(0.1)
        self.stage.act = STORING
        self.wait(self.of("consumer"))
        self.stage.act = OVER
        self.wait(self.of("forwarder"))

    def of(self, *kinds: str) -> list[Role]:
        return [role for role in self.roles if role.kind in kinds]

    def wait(self, roles: list[Role]) -> None:
        """Until all of them have ended."""
        deadline = time.monotonic() + 2 * FINALE
        while running := [role.name for role in roles if self.look(role)]:
            if time.monotonic() > deadline:
                raise Ended(f"{running} do not come to an end")
            time.sleep(0.02)

    def close(self) -> None:
        """Nobody is left behind."""
        for role in self.roles:
            if role.pid:
                os.kill(role.pid, signal.SIGKILL)
                os.waitpid(role.pid, 0)
                role.pid = 0
        self._recorder.close()


# --- the verdict -----------------------------------------------------------------------------------

Id = tuple[str, int, int]


def wishes(world: World) -> dict[str, set[Id]]:
    """By cursor: the messages of all journals that its consumers are to be given."""
    messages = {m[1:4] for journal in world.claims for m in stored(world.folder / f"{journal}.journal")}
    wants = {cursor: Matcher(patterns).matches for cursor, patterns in CURSORS.items()}
    return {cursor: {m for m in messages if matches(m[0])} for cursor, matches in wants.items()}


class Given:
    """What consumers have written down so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: Counter[Path] = Counter()  # bytes
        self._given: dict[str, set[Id]] = {cursor: set() for cursor in CURSORS}

    def to(self, cursor: str) -> set[Id]:
        """All that was given to anybody under this name."""
        for path in self._folder.glob(f"{cursor}*.jsonl"):
            with open(path, "rb") as file:
                file.seek(self._read[path])
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            self._read[path] += len(data)
            for line in parse(data, path.name):
                if isinstance(event := line.event, Consumed):
                    self._given[cursor].add((event.topic, event.origin, event.seq))
        return self._given[cursor]


def judge(world: World) -> dict[str, Report]:
    """The reports on all journals."""
    lines = load(world.folder.glob("*.jsonl"))
    reports: dict[str, Report] = {}
    for journal, claims in world.claims.items():
        mine = Matcher(claims).matches

        def concerns(line: Line, journal: str = journal, mine: Callable[[str], bool] = mine) -> bool:
            event = line.event
            if isinstance(event, Sent | Acked | Failed):
                return mine(event.topic)
            if isinstance(event, Opened | Consumed | Committed):
                return event.consumer.endswith(f"@{journal}")
            return False

        after = [
            Line(Journaled(m.offset, m.topic, m.origin, m.seq, digest_of(m.value)), f"{journal}.journal", m.offset)
            for m in stored(world.folder / f"{journal}.journal")
        ]
        reports[journal] = check([*(line for line in lines if concerns(line)), *after])
    return reports


def run(seed: int, folder: Path, kills: int) -> Outcome:
    """One world. Raises Ended."""
    began = time.monotonic()
    director = Director(seed, folder)
    try:
        director.play(kills)
        director.finish()
    finally:
        director.close()
    reports = judge(director.world)
    complaints = [f"{path.stem}: {text}" for path in sorted(folder.glob("*.stderr")) if (text := path.read_text())]
    seconds = time.monotonic() - began
    return Outcome(seed, director.kills, director.stops, director.leaves, seconds, reports, complaints)


def main(folder: str, seed: str, kills: str, sabotage: str = "") -> None:
    """The process: prints the outcome, and dies with whoever wants it. `sabotage`: one of sabotages.py."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # children inherit this, until they look for it
    if sabotage:
        getattr(import_module("sabotages"), sabotage)(pytest.MonkeyPatch())
    try:
        outcome = run(int(seed), Path(folder), int(kills))
    except Ended as error:
        print(json.dumps({"seed": int(seed), "broken": [str(error)]}))
        return
    counts: Counter[str] = sum((report.counts for report in outcome.reports.values()), Counter())
    broken = [f"{journal}: {v}" for journal, report in outcome.reports.items() for v in report.violations]
    facts: dict[str, Any] = {
        "seed": outcome.seed,
        "kills": outcome.kills,
        "stops": outcome.stops,
        "leaves": outcome.leaves,
        "seconds": round(outcome.seconds, 1),
        "journals": list(outcome.reports),
        "counts": counts,
        "broken": [*broken, *outcome.complaints][:50],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
