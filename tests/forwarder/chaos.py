"""Chaos: a world of forwarders, publishers and durable consumers, in which processes are killed at any instant.

    outcome = run(seed, folder, kills=100)       # in a process that has no threads and no sockets: it forks
    outcome.reports["forwarder"].raise_if_broken()

or, as a process of its own, `python -m tests.forwarder.chaos FOLDER SEED KILLS`, which prints the outcome as JSON.

The **director** forks a process for each role (chaos_roles.py), and kills and restarts them: tests/chaos/director.py.
After the last kill everybody comes to an end: publishers when all they have published is durable and their outboxes are
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
import json
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chaos_roles import CONSUMING, OVER, STORING, ForwarderLife, World, consume, digest_of, publish, store
from history import Acked, Committed, Consumed, Failed, Journaled, Killed, Line, Opened, Recorder, Sent, load, parse
from history_checker import check

from tests.chaos.director import FINALE, PR_SET_PDEATHSIG, Director, Ended, Role
from tests.chaos.verdict import Report
from tests.forwarder.forwarders import stored
from zmqbus.protocol.topics import Matcher

EVERYTHING = {"forwarder": [">"]}
SHARED = {"logs": ["logs.>"], "metrics": ["metrics.>"]}
TWINS = {"one": [">"], "two": [">"]}
CURSORS = {"indexer": [">"], "archive": ["logs.*", "metrics.cpu"]}


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


class Chaos(Director):
    """The director of such a world."""

    def __init__(self, seed: int, folder: Path) -> None:
        claims = (EVERYTHING, SHARED, TWINS)[seed % 3]
        roles = [Role(name, "forwarder", 0.35 / len(claims), store) for name in claims]
        for number in range(4):
            kind = "outbox" if number % 2 else "publisher"
            work = partial(publish, outbox=bool(number % 2))
            roles.append(Role(f"{kind}-{number}", kind, 0.1, work))
        for cursor, patterns in CURSORS.items():
            for rival in (False, True):
                work = partial(consume, cursor=cursor, patterns=patterns, rival=rival)
                roles.append(Role(f"{cursor}{'-rival' * rival}", "consumer", 0.06, work))
        super().__init__(seed, folder, roles)
        self.world = World(folder, f"chaos-{secrets.token_hex(6)}", seed, claims, claims is TWINS, self.stage)
        self._recorder = Recorder(folder / "director.jsonl")

    def life(self, role: Role) -> ForwarderLife:
        return ForwarderLife(self.world, role.name, role.lives)

    def note_kill(self, role: Role) -> None:
        self._recorder.record(Killed(role.name))

    def finish(self) -> None:
        """Everybody comes to an end, publishers first."""
        self.calm(CONSUMING)
        self.wait(self.of("publisher", "outbox"))
        given = Given(self.folder)
        wanted = wishes(self.world)
        lacking: list[int] = []

        def all_given() -> bool:
            lacking[:] = [len(messages - given.to(cursor)) for cursor, messages in wanted.items()]
            return not any(lacking)

        self.wait_until(all_given, lambda: f"consumers do not get to the end, they lack {lacking} messages", FINALE)
        self.stage.act = STORING
        self.wait(self.of("consumer"))
        self.stage.act = OVER
        self.wait(self.of("forwarder"))

    def close(self) -> None:
        super().close()
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
    director = Chaos(seed, folder)
    try:
        director.play(kills)
        director.finish()
    finally:
        director.close()
    reports = judge(director.world)
    seconds = time.monotonic() - began
    return Outcome(seed, director.kills, director.stops, director.leaves, seconds, reports, director.complaints())


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
