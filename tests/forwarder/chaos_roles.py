"""What the processes of a world of chaos do until they are killed: forwarders, publishers and durable consumers.

Each is a fork of the director (chaos.py), which has no sockets and no threads. It draws what it does from its seed,
writes down what it was told (history.py: one file for each life), and looks at the `Stage` for when to come to an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any, NamedTuple

from history import Acked, Committed, Consumed, Failed, Opened, Recorder, Sent, digest

from tests.chaos.director import FINALE, Life, Stage
from tests.chaos.values import value_of
from zmqbus import AsyncNode, BufferFull, Message, Node, NotDurable
from zmqbus.errors import SubscriptionTaken, WaitTimeout
from zmqbus.forwarder import Forwarder
from zmqbus.journal import Journal
from zmqbus.net.adapter import run_main
from zmqbus.protocol.topics import Matcher

PUBLISHING, CONSUMING, STORING, OVER = range(4)  # who still works: each stage ends the role that gave it its name
BOTH = "both"  # what is said to be the journal where nobody can tell
TOPICS = ("logs.a", "logs.b", "metrics.cpu", "metrics.mem")
SEGMENT_BYTES = 1 << 20  # of journals, so that segments change while processes are killed
OUTBOX_BYTES = 16 << 20
PACE = 0.04  # seconds at most between two actions of a publisher


def digest_of(value: Any) -> str:
    """What stands for a value in a history."""
    return digest(value.encode() if isinstance(value, str) else value)


class World(NamedTuple):
    """What all of them know."""

    folder: Path
    bus: str
    seed: int
    claims: dict[str, list[str]]
    """The topics of each forwarder."""
    twins: bool
    """Whether two of them claim the same, and publishers want both to have it."""
    stage: Stage


class ForwarderLife(Life):
    """One process of a role, from its start to its end."""

    def __init__(self, world: World, role: str, number: int) -> None:
        super().__init__(world.folder, world.stage, world.seed, role, number)
        self.world = world

    @property
    def is_publishing(self) -> bool:
        """Whether there is to be more of it."""
        return self.stage.act == PUBLISHING and not self.leaving

    @property
    def is_consuming(self) -> bool:
        """The same."""
        return self.stage.act <= CONSUMING and not self.leaving

    def recorder(self) -> Recorder:
        return Recorder(self.folder / f"{self.name}.jsonl")


# --- forwarders ------------------------------------------------------------------------------------


def store(life: ForwarderLife) -> None:
    """Be a forwarder until all is over."""

    async def main() -> None:
        world = life.world
        path = world.folder / f"{life.role}.journal"
        async with Forwarder(path, topics=world.claims[life.role], name=life.role, bus=world.bus) as forwarder:
            failed = asyncio.ensure_future(forwarder.failed())
            while life.stage.act < OVER and not life.leaving:
                await asyncio.wait([failed], timeout=0.05)
                if failed.done():
                    failed.result()
            failed.cancel()

    Journal.open = partial(Journal.open, segment_bytes=SEGMENT_BYTES)  # type: ignore[method-assign]
    run_main(main())


# --- publishers ------------------------------------------------------------------------------------


class Account:
    """What one origin has published, and what it was told of that."""

    def __init__(self, recorder: Recorder, origin: int, whole: bool) -> None:
        """`whole`: an acknowledgement is one of the whole stream from its first message on."""
        self.origin = origin
        self._recorder, self._whole = recorder, whole
        self.published = dict.fromkeys(TOPICS, 0)
        self._announced = dict.fromkeys(TOPICS, 0)
        self._acked: dict[str, int] = {}  # of streams that are known to be acknowledged

    def prepare(self, topic: str, count: int = 1) -> list[bytes | str]:
        """The values of the next messages, which are about to be published."""
        first = self.published[topic] + 1
        seqs = range(first, first + count)
        values = [value_of(topic, self.origin, seq) for seq in seqs]
        new = [(seq, value) for seq, value in zip(seqs, values, strict=True) if seq > self._announced[topic]]
        self._recorder.record(*(Sent(topic, self.origin, seq, digest_of(value)) for seq, value in new))
        self._announced[topic] = max(self._announced[topic], seqs[-1])
        return values

    def done(self, topic: str, seq: int, count: int = 1) -> None:
        """They were published, the last as `seq`."""
        self.published[topic] += count
        assert seq == self.published[topic], f"{topic}: seq {seq}, expected {self.published[topic]}"

    def acked(self, topic: str, seq: int) -> None:
        """A durable publish returned."""
        before = self._acked.get(topic, 0 if self._whole else seq - 1)
        if seq > before:
            self._recorder.record(Acked(topic, self.origin, seq, before + 1))
            self._acked[topic] = seq

    def failed(self, topic: str, seq: int | None) -> None:
        """NotDurable: it may be, or not."""
        assert seq is not None
        assert seq <= self.published[topic]
        self._recorder.record(Failed(topic, self.origin, seq))

    def flushed(self, upto: dict[str, int]) -> None:
        """A flush returned: of streams that are known to be acknowledged, it was one of all that was published."""
        for topic in self._acked:
            self.acked(topic, upto[topic])


def publish(life: ForwarderLife, outbox: bool) -> None:
    """Publish until told to stop, now and then as a new origin; then see to it that all is where it should be."""
    recorder = life.recorder()
    asynchronous = life.rng.random() < 0.4
    over = False
    while not over and not life.leaving:
        over = asyncio.run(_publish_async(life, recorder, outbox)) if asynchronous else _publish(life, recorder, outbox)


def _options(life: ForwarderLife, outbox: bool, small: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"bus": life.world.bus, "name": life.role, "acks": 2 if life.world.twins else 1}
    if small:
        options |= {"history_bytes": 100_000, "buffer_bytes": 300_000}
    if outbox:
        options |= {"outbox": life.world.folder / f"{life.role}.outbox", "outbox_bytes": OUTBOX_BYTES}
    return options


def _publish(life: ForwarderLife, recorder: Recorder, outbox: bool) -> bool:
    """As one origin. Returns whether that was the last."""
    rng, small = life.rng, life.rng.random() < 0.4
    with Node(**_options(life, outbox, small)) as node:
        account = Account(recorder, node.origin, whole=outbox or not small)
        topics = rng.sample(TOPICS, rng.randint(1, 3))

        def durable(topic: str, timeout: float) -> bool:
            (value,) = account.prepare(topic)
            try:
                seq = node.publish(topic, value, durable=True, timeout=timeout)
            except BufferFull:
                return False  # nothing was published
            except NotDurable as error:
                account.done(topic, error.seq or 0)
                account.failed(topic, error.seq)
                return False
            account.done(topic, seq)
            account.acked(topic, seq)
            life.perhaps_die()
            return True

        def flush(timeout: float) -> None:
            upto = dict(account.published)
            with contextlib.suppress(NotDurable):
                node.flush(timeout)
                account.flushed(upto)
                life.perhaps_die()

        def one_by_one(topic: str) -> None:
            for _ in range(rng.randint(1, 10)):
                (value,) = account.prepare(topic)
                account.done(topic, node.publish(topic, value))
                life.pause(0.003)

        def burst(topic: str) -> None:
            values = account.prepare(topic, rng.randint(20, 200))
            if rng.random() < 0.5:
                account.done(topic, node.publisher(topic).send_many(values), len(values))
            else:
                for value in values:
                    account.done(topic, node.publish(topic, value))

        def patience() -> float:
            return rng.choice((0.02, 0.2, 1.0, 3.0))

        if outbox:  # which has a stream from its first durable message on
            for topic in topics:
                durable(topic, 5.0)
        while life.is_publishing and rng.random() > 0.01:
            topic = rng.choice(topics)
            draw = rng.random()
            if draw < 0.4 and (account.published[topic] or not outbox):
                rng.choice((one_by_one, burst))(topic)
            elif draw < 0.7:
                durable(topic, patience())
            else:
                flush(patience())
            life.pause(PACE)
        over = life.stage.act != PUBLISHING and not life.leaving
        if over:
            for topic in topics:  # not at once, where forwarders have yet to be met
                wait_until(partial(durable, topic, 5.0), f"{topic} is durable")
            flush(FINALE)
            if outbox:
                wait_until(lambda: node.statistics()["outbox_undelivered"] == 0, "the outbox is delivered")
        return over


async def _publish_async(life: ForwarderLife, recorder: Recorder, outbox: bool) -> bool:
    """The same in asyncio."""
    rng = life.rng
    async with AsyncNode(**_options(life, outbox, small=False)) as node:
        account = Account(recorder, node.origin, whole=True)
        topics = rng.sample(TOPICS, rng.randint(1, 3))

        async def durable(topic: str, timeout: float) -> bool:
            (value,) = account.prepare(topic)  # its seq is drawn before anything is waited for: there is always room
            seq = account.published[topic] = account.published[topic] + 1
            try:
                assert await node.publish(topic, value, durable=True, timeout=timeout) == seq
            except NotDurable as error:
                account.failed(topic, error.seq)
                return False
            account.acked(topic, seq)
            life.perhaps_die()
            return True

        async def flush(timeout: float) -> None:
            upto = dict(account.published)
            with contextlib.suppress(NotDurable):
                await node.flush(timeout)
                account.flushed(upto)

        if outbox:
            await asyncio.gather(*(durable(topic, 5.0) for topic in topics))
        while life.is_publishing and rng.random() > 0.01:
            draw, timeout = rng.random(), rng.choice((0.05, 0.5, 2.0))
            if draw < 0.3 and (account.published[topics[0]] or not outbox):
                for value in account.prepare(topics[0], rng.randint(1, 100)):
                    account.done(topics[0], await node.publish(topics[0], value))
            elif draw < 0.8:
                many = (durable(rng.choice(topics), timeout) for _ in range(rng.choice((1, 5, 50))))
                await asyncio.gather(*many)
            else:
                await flush(timeout)
            await asyncio.sleep(rng.uniform(0, PACE))
        over = life.stage.act != PUBLISHING and not life.leaving
        if over:
            deadline = time.monotonic() + FINALE
            while not all(await asyncio.gather(*(durable(topic, 5.0) for topic in topics))):
                assert time.monotonic() < deadline, f"{topics} are not durable"
            await flush(FINALE)
            if outbox:
                while (left := node.statistics()["outbox_undelivered"]) > 0:
                    assert time.monotonic() < deadline, f"{left} messages stay in the outbox"
                    await asyncio.sleep(0.05)
        return over


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + FINALE
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen that {what}"
        time.sleep(0.02)


# --- consumers -------------------------------------------------------------------------------------


class Diary:
    """What one session of a consumer was given, and told. One journal's offsets are not another's: each has its own
    consumer in the history, named cursor@journal. Where two journals have the same, what is read is of both."""

    def __init__(self, world: World, recorder: Recorder, cursor: str, patterns: list[str]) -> None:
        self._recorder, self._cursor, self._twins = recorder, cursor, world.twins
        self._claims = {journal: Matcher(claims).matches for journal, claims in world.claims.items()}
        self._reached: dict[str, int] = {}
        recorder.record(*(Opened(f"{cursor}@{journal}", patterns) for journal in (*self._claims, BOTH)))

    def given(self, message: Message) -> tuple[str, int]:
        """Returns whose it is, and its place."""
        m = message
        journal = BOTH if self._twins else next(name for name, claims in self._claims.items() if claims(m.topic))
        assert m.offset is not None
        consumer = f"{self._cursor}@{journal}"
        self._recorder.record(Consumed(consumer, m.offset, m.topic, m.origin, m.seq, digest_of(m.value)))
        self._reached[journal] = m.offset + 1
        return journal, m.offset

    def reached(self, in_hand: Iterable[tuple[str, int]] = ()) -> dict[str, int]:
        """All that was given, by journal, but for what others have in hand."""
        reached = dict(self._reached)
        for journal, offset in in_hand:
            reached[journal] = min(reached[journal], offset)
        return reached

    def committed(self, reached: dict[str, int]) -> None:
        self._recorder.record(*(Committed(f"{self._cursor}@{journal}", at) for journal, at in reached.items()))


def consume(life: ForwarderLife, cursor: str, patterns: list[str], rival: bool) -> None:
    """Read under a name, in several sessions, until told to stop; who is a `rival` takes it over, and then leaves."""
    recorder, rng = life.recorder(), life.rng
    session = rng.choice((_consume, _consume, _consume_together, _consume_async))
    while life.is_consuming:
        if rival:
            life.pause(2.0)
            if not life.is_publishing:
                return
        with contextlib.suppress(SubscriptionTaken):
            session(life, partial(Diary, life.world, recorder, cursor, patterns), cursor, patterns)
            continue
        life.pause(0.5)  # and then it takes it back


def _consume(life: ForwarderLife, open_diary: Callable[[], Diary], cursor: str, patterns: list[str]) -> None:
    rng = life.rng
    with Node(life.role, bus=life.world.bus) as node:
        while life.is_consuming and rng.random() > 0.1:
            diary, slow = open_diary(), rng.random() < 0.2
            subscription = node.subscribe(*patterns, durable=cursor, start="first")
            for _ in range(rng.choice((3, 100, 2000, 20_000))):
                message = subscription.get(0.1)
                if message is not None:
                    diary.given(message)
                if not life.is_consuming:
                    break
                if slow and life.is_publishing:
                    life.pause(0.01)
                if rng.random() < 0.002:
                    with contextlib.suppress(WaitTimeout):
                        subscription.commit(rng.choice((0.01, 1.0, 5.0)))
                        diary.committed(diary.reached())
                        life.perhaps_die()
            if rng.random() < 0.5:
                with contextlib.suppress(WaitTimeout):
                    subscription.commit(2.0)
                    diary.committed(diary.reached())
            subscription.close()


def _consume_together(life: ForwarderLife, open_diary: Callable[[], Diary], cursor: str, patterns: list[str]) -> None:
    """Two threads share a subscription. What they are given is written down in order; what they do with it is not."""
    diary, turn = open_diary(), Lock()
    in_hand: dict[int, tuple[str, int]] = {}

    def work(number: int, rng: Random) -> None:
        for _ in range(rng.choice((3, 100, 2000))):
            if not life.is_consuming:
                break
            with turn:
                message = subscription.get(0)
                in_hand.pop(number, None)
                if message is not None:
                    in_hand[number] = diary.given(message)
            if message is None:
                time.sleep(0.01)
            elif rng.random() < 0.01:
                if life.is_publishing:
                    time.sleep(rng.uniform(0, 0.5))
                with turn:
                    reached = diary.reached(held for whose, held in in_hand.items() if whose != number)
                with contextlib.suppress(WaitTimeout):
                    subscription.commit(1.0)
                    with turn:
                        diary.committed(reached)

    with Node(life.role, bus=life.world.bus) as node:
        subscription = node.subscribe(*patterns, durable=cursor, start="first")
        with ThreadPoolExecutor(2) as threads:
            works = [threads.submit(work, number, Random(life.rng.random())) for number in range(2)]
        for done in works:
            done.result()
        subscription.close()


def _consume_async(life: ForwarderLife, open_diary: Callable[[], Diary], cursor: str, patterns: list[str]) -> None:
    rng = life.rng

    async def main() -> None:
        async with AsyncNode(life.role, bus=life.world.bus) as node:
            while life.is_consuming and rng.random() > 0.1:
                diary = open_diary()
                async with node.subscribe(*patterns, durable=cursor, start="first") as subscription:
                    for _ in range(rng.choice((3, 100, 2000, 20_000))):
                        message = await subscription.get(0.1)
                        if message is not None:
                            diary.given(message)
                        if not life.is_consuming:
                            break
                        if rng.random() < 0.002:
                            with contextlib.suppress(WaitTimeout):
                                await subscription.commit(rng.choice((0.01, 1.0, 5.0)))
                                diary.committed(diary.reached())

    run_main(main())
