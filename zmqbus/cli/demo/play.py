"""The acts of the demo, in order, on a bus of its own.

1. Every log file has a shipper; aggregators follow; a forwarder journals, and `indexer` reads its log.
2. One aggregator hangs during a spike; another comes late.
3. `indexer` is killed, then the forwarder; both are started again. The shippers go on all the while.
4. They fall silent. Three workers share the lines of the first file, those of the spike among them, as the journal has
   them; one is slow, and one is killed.
5. The account is settled.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path

from zmqbus.cli.demo.account import (
    Account,
    Key,
    Life,
    Settled,
    Share,
    by_stream,
    consumed,
    done,
    journaled,
    settle,
    settle_stored,
)
from zmqbus.cli.demo.crew import Actor, Crew
from zmqbus.cli.demo.members import CONFIRM, IDLE, SPIKE_LINES, START_TIMEOUT, TICK, follow, ship
from zmqbus.cli.demo.sharing import GROUP, SLOW, share
from zmqbus.cli.demo.sources import Source
from zmqbus.cli.demo.stage import Stage
from zmqbus.cli.demo.storing import NAME, index, keep
from zmqbus.cli.messages.forms import human_age, human_bytes
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.output import plural
from zmqbus.net.clock import now

ACTS = 6  # into which the time for shipping is divided
CATCH_UP = 20.0  # seconds, for those who were away, before the shippers leave
DOOMED = 20  # a worker is killed after it has done this part of all: a twentieth
WORK = 30.0  # seconds without progress, while there is something left to do


class Play:
    """Directs the crew."""

    def __init__(self, stage: Stage, crew: Crew, shipped: Sequence[Source], folder: Path, journal: str) -> None:
        """`folder`: for the indexes of the consumer."""
        self._stage = stage
        self._crew = crew
        self._bus = f"demo-{secrets.token_hex(4)}"
        self._shipped = shipped
        self._folder = folder
        self._journal = journal
        self._forwarders: list[Actor] = []  # each life of it
        self._consumers: list[Actor] = []
        self._workers: list[Actor] = []
        self._work_seconds = 0.0
        self._forwarder_seconds = 0.0  # that it was there while lines were shipped
        self._up_at = 0.0

    def perform(self, rate: int, seconds: float, history: int) -> Settled:
        """All of it."""
        stage, crew, act = self._stage, self._crew, seconds / ACTS
        shippers, steady, paused = self._gather()
        each = max(1, rate // len(shippers))
        self._up_at = now()
        crew.tell(shippers, "rate", each)
        stage.say(f"they ship {each * len(shippers):,} lines per second")
        crew.listen(act)
        self._hang(shippers[0], paused, steady, act)
        late, joined_at = self._join_late(shippers, len(crew.actors), history)
        crew.listen(act)
        self._kill_and_restart(act)
        crew.listen(act)
        heads = self._fall_silent(shippers, steady, paused)
        aggregators = [steady, paused, late]
        crew.tell(aggregators, "finish", heads)
        crew.expect(aggregators, "streams", START_TIMEOUT)
        self._share(sum(self._shared(heads).values()))
        whole = dict.fromkeys(heads, 1)
        # They said so after it had joined: when it did, they were no further, and so it is owed this much, or more.
        tail = {key: max(1, seq - history + 1) for key, seq in zip(heads, joined_at, strict=True)}
        starts = (whole, whole, tail)
        return self._settle(heads, [settle(one, heads, s) for one, s in zip(aggregators, starts, strict=True)])

    # --- the acts ------------------------------------------------------------------------------------

    def _gather(self) -> tuple[list[Actor], Actor, Actor]:
        crew, bus = self._crew, self._bus
        shippers = [
            crew.start(ship, bus, f"ship-{one.topic.split('.')[-1]}", one.topic, one.path) for one in self._shipped
        ]
        steady, paused = crew.start(follow, bus, "steady", 0), crew.start(follow, bus, "paused", 0)
        forwarder, indexer = self._start_forwarder(), self._start_indexer()
        everybody = (*shippers, steady, paused, forwarder, indexer)
        self._stage.say(
            f"{len(everybody)} processes start: a shipper per file, aggregators `steady`, `paused`, a forwarder, and "
            f"`{NAME}`, which reads its log"
        )
        crew.expect(everybody, "up", START_TIMEOUT)
        crew.journal_start = forwarder.facts["recovered"]
        meeting = (*shippers, steady, paused)
        crew.tell(meeting, "meet", len(everybody) - 1)
        crew.expect(meeting, "met", START_TIMEOUT)
        wait = max(one.facts["met"] for one in meeting) - max(one.facts["up"] for one in everybody)
        self._stage.say(f"all have found each other by mDNS, {human_age(max(0.0, wait))} after the last was up")
        return shippers, steady, paused

    def _hang(self, shipper: Actor, paused: Actor, steady: Actor, act: float) -> None:
        crew, stage = self._crew, self._stage
        crew.tell([steady], "guard", paused.process.pid)
        os.kill(paused.process.pid, signal.SIGSTOP)
        paused.state = " (stopped)"
        stage.say("`paused` is stopped (SIGSTOP), as if its machine hung")
        crew.tell([shipper], "spike")
        stage.say(f"just then {shipper.name} has a spike of {SPIKE_LINES:,} lines")
        crew.expect([shipper], "spiked", START_TIMEOUT)
        crew.listen(act)
        os.kill(paused.process.pid, signal.SIGCONT)
        crew.tell([steady], "guard")
        paused.state = ""
        stage.say("`paused` goes on (SIGCONT), fetching what it missed from the shippers")
        crew.listen(act)

    def _join_late(self, shippers: Sequence[Actor], others: int, history: int) -> tuple[Actor, list[int]]:
        crew = self._crew
        late = crew.start(follow, self._bus, "late", history)
        crew.expect([late], "up", START_TIMEOUT)
        crew.tell([late], "meet", others)
        crew.expect([late], "met", START_TIMEOUT)
        wait = late.facts["met"] - late.facts["up"]
        self._stage.say(f"`late` joins, {human_age(wait)} after it was up, asking for {history:,} earlier lines")
        return late, crew.ask(shippers, "where", START_TIMEOUT)

    def _kill_and_restart(self, act: float) -> None:
        crew, stage = self._crew, self._stage
        indexer, forwarder = self._consumers[-1], self._forwarders[-1]
        crew.kill(indexer)
        indexer.state = " (killed)"
        stage.say(f"`{NAME}` is killed (kill -9), after {indexer.facts.get('consumed', 0):,} lines or a few more")
        crew.listen(act / 2)
        crew.kill(forwarder)
        forwarder.state = " (killed)"
        self._forwarder_seconds += now() - self._up_at
        stage.say("the forwarder is killed (kill -9); the shippers go on, and keep what it has not acknowledged")
        crew.listen(act / 2)
        forwarder = self._start_forwarder()
        crew.expect([forwarder], "up", START_TIMEOUT)
        self._up_at = now()
        torn = ", a torn end put aside" * bool(forwarder.facts["torn"])
        recovered = forwarder.facts["recovered"] - crew.journal_start
        stage.say(f"the forwarder is back on its journal: {plural(recovered, 'line')} recovered{torn}")
        indexer = self._start_indexer()
        crew.expect([indexer], "places", START_TIMEOUT)
        crew.until(lambda: bool(indexer.facts["places"]), START_TIMEOUT)
        begin = max((begin for begin, _, _ in indexer.facts["places"]), default=crew.journal_start)
        stage.say(f"`{NAME}` is back, and goes on behind line {begin - crew.journal_start:,} of the journal")

    def _fall_silent(self, shippers: Sequence[Actor], steady: Actor, paused: Actor) -> dict[Key, int]:
        crew, stage = self._crew, self._stage
        crew.tell(shippers, "rate", 0)
        silent_at = now()
        sent = sum(crew.ask(shippers, "where", START_TIMEOUT))
        forwarder, indexer = self._forwarders[-1], self._consumers[-1]

        def caught_up() -> bool:
            stored = forwarder.facts["journaled"]
            read = all(following >= stored for _, following, _ in indexer.facts["places"])
            return _has(steady, sent) and _has(paused, sent) and stored - crew.journal_start >= sent and read

        if crew.until(caught_up, CATCH_UP):
            state = f"caught up {human_age(now() - silent_at)} later"
        else:
            state = f"not all caught up within {CATCH_UP:g} s"
        self._forwarder_seconds += now() - self._up_at
        stage.say(f"shippers fall silent; aggregators, forwarder and `{NAME}` have {state}")
        crew.tell(shippers, "stop")
        crew.expect(shippers, "stopped", CONFIRM + START_TIMEOUT)
        heads = {
            (source.topic, one.facts["origin"]): one.facts["sent"]
            for source, one in zip(self._shipped, shippers, strict=True)
        }
        stage.say(f"the shippers have left, after {sum(heads.values()):,} lines")
        for one in shippers:
            if one.facts["unconfirmed"]:
                remark(f"{one.name} left before {', '.join(one.facts['unconfirmed'])} had confirmed everything")
        return heads

    def _share(self, total: int) -> None:
        crew, stage = self._crew, self._stage
        file, topic = self._shipped[0].path.name, self._shipped[0].topic
        parts = (("doomed", 0.0, total / DOOMED), ("quick", 0.0, inf), ("slow", SLOW, inf))
        doomed, quick, slow = self._workers = [
            crew.start(share, self._bus, name, topic, self._work(name), crew.journal_start, takes, stuck_at)
            for name, takes, stuck_at in parts
        ]
        stage.say(
            f"three workers share {total:,} of these lines, those of {file}: `doomed`, `quick`, and `slow`, which "
            f"takes {human_age(SLOW)} for each"
        )
        crew.expect(self._workers, "up", START_TIMEOUT)
        began = now()
        crew.expect([doomed], "in_hand", WORK)
        crew.kill(doomed)
        doomed.state = " (killed)"
        some = f"{doomed.facts['done']:,} lines and with more in hand"
        stage.say(f"`doomed` is killed (kill -9) in mid-work, after {some}, which go to the others")
        finished = self._until_worked(total)
        self._work_seconds = now() - began
        crew.tell([quick, slow], "finish")
        crew.expect([quick, slow], "finished", START_TIMEOUT)
        state = "all is done" if finished else "not all is done, and nothing is left to do"
        stage.say(f"{state}: {quick.facts['done']:,} lines by `quick`, {slow.facts['done']:,} by `slow`")

    def _until_worked(self, total: int) -> bool:
        """Until all is done, or for a while nothing more. Returns whether it is all."""
        facts = self._forwarders[-1].facts
        worked, moved_at = -1, now()
        while facts["worked"] < total or facts["left"]:
            if facts["worked"] > worked:
                worked, moved_at = facts["worked"], now()
            if now() - moved_at >= (WORK if facts["left"] else IDLE):
                return False
            self._crew.listen(TICK)
        return True

    def _settle(self, heads: dict[Key, int], aggregators: list[Account]) -> Settled:
        crew, forwarder, indexer = self._crew, self._forwarders[-1], self._consumers[-1]
        [end] = crew.ask([forwarder], "where", START_TIMEOUT)
        crew.tell([indexer], "finish", end)
        crew.expect([indexer], "finished", START_TIMEOUT)
        crew.tell([forwarder], "stop")
        crew.expect([forwarder], "stopped", START_TIMEOUT)
        facts = forwarder.facts
        self._stage.say(
            f"the forwarder has left; {human_bytes(facts['journal_bytes'])} in its second life, "
            f"fsync {facts['fsync_p50_ms']:.1f}ms (median); its journal is read, and the index of `{NAME}`"
        )
        stored, cursor, end = journaled(self._journal, crew.journal_start, heads)
        lives = [consumed(self._index(number)) for number in range(len(self._consumers))]
        kept_gaps = [gap for one in self._forwarders for gap in one.facts.get("gaps", ())]
        read_gaps = [gap for one in self._consumers for gap in one.facts.get("gaps", ())]
        lost = sum(one.facts.get("lost", 0) for one in self._consumers)
        seconds = sum(one.facts.get("seconds", 0.0) for one in self._consumers)
        journal = settle_stored("forwarder", heads, [stored], kept_gaps, 0, self._forwarder_seconds)
        consumer = settle_stored(NAME, heads, lives, read_gaps, lost, seconds)
        work = {one.name: done(self._work(one.name)) for one in self._workers}
        worked = [life for of_one in work.values() for life in of_one]
        workers = settle_stored(GROUP, self._shared(heads), worked, (), 0, self._work_seconds)
        workers.redelivered = sum(one.facts.get("again", 0) for one in self._workers)
        shares = [Share(name, _number(of_one), name == "doomed") for name, of_one in work.items()]
        streams = by_stream(heads, stored, lives, worked)
        return Settled(aggregators, journal, consumer, workers, shares, streams, cursor, end)

    # --- the forwarder and its consumer --------------------------------------------------------------

    def _start_forwarder(self) -> Actor:
        self._forwarders.append(self._crew.start(keep, self._bus, "forwarder", self._journal))
        return self._forwarders[-1]

    def _start_indexer(self) -> Actor:
        path = self._index(len(self._consumers))
        self._consumers.append(self._crew.start(index, self._bus, NAME, path))
        return self._consumers[-1]

    def _index(self, life: int) -> Path:
        return self._folder / f"index-{life + 1}"

    def _shared(self, heads: Mapping[Key, int]) -> dict[Key, int]:
        """What workers share: the lines of the first file."""
        return {key: head for key, head in heads.items() if key[0] == self._shipped[0].topic}

    def _work(self, worker: str) -> Path:
        return self._folder / f"work-{worker}"


def _number(lives: Sequence[Life]) -> int:
    return sum(last - first + 1 for life in lives for seqs in life.values() for first, last in seqs.spans)


def _has(aggregator: Actor, lines: int) -> bool:
    return bool(aggregator.facts["received"] + aggregator.facts["lost"] >= lines)
