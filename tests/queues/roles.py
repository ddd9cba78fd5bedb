"""What the processes of a world of queues do until they are killed: forwarder, producers and workers.

Each is a fork of the director (chaos.py), which has no sockets and no threads. It draws what it does from its seed,
and writes down what it is about to do and what it was told (history.py: one file for each life). Once nobody is killed
any more, workers do nothing wrong either: all comes to an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.chaos.director import FINALE, Life, Stage
from tests.chaos.values import value_of
from tests.queues.history import (
    Closed,
    Confirmed,
    Extending,
    Failing,
    Given,
    Handled,
    Job,
    Joining,
    Killed,
    Leaving,
    Letter,
    Met,
    Parted,
    Pushed,
    Pushing,
    Recorder,
    Refused,
)
from zmqbus import AsyncNode, BufferFull, Node, NotDurable, PeerJoined, PeerLeft
from zmqbus.errors import NotSettled
from zmqbus.forwarder import Forwarder
from zmqbus.journal import Journal
from zmqbus.net.adapter import run_main
from zmqbus.node.engine import Engine
from zmqbus.node.work.queues.job import Job as Task

PLAYING, SETTLING, FINISHING, OVER = range(4)  # producers end in the second, workers in the third, forwarders at last
QUEUES = ("jobs.a", "jobs.b", "mail")
EVERYTHING, DEAD = ">", "$dead.>"
PATTERNS = ("jobs.>", "jobs.a", "mail", EVERYTHING)
SEGMENT_BYTES = 1 << 20  # of journals, so that segments change while processes are killed
PACE = 0.06  # seconds at most between two actions of a producer
LEASES = (0.4, 1.0, 600.0, 600.0)
CREDITS = (None, None, 1, 7, 1000)
SPEEDS = (0.0, 0.0, 0.003, 0.02)  # seconds at most for a job


class World(NamedTuple):
    """What all of them know."""

    folder: Path
    bus: str
    seed: int
    stage: Stage
    forwarder: bool
    """There is one, at some time."""


class QueueLife(Life):
    """One process of a role."""

    def __init__(self, world: World, role: str, number: int) -> None:
        super().__init__(world.folder, world.stage, world.seed, role, number)
        self.world = world
        self.sessions = 0
        """Of workers, so far."""
        self.names: dict[int, str] = {}
        """Of processes, by the origins of nodes that were seen."""

    @property
    def is_pushing(self) -> bool:
        """Whether there is to be more of it, and things may go wrong."""
        return self.stage.act == PLAYING and not self.leaving

    @property
    def is_working(self) -> bool:
        """Whether there may be something to do."""
        return self.stage.act <= SETTLING and not self.leaving

    def begin(self) -> None:
        super().begin()
        self.recorder = Recorder(self.folder / f"{self.name}.jsonl")

    def perhaps_be_gone(self) -> None:
        """As `perhaps_die`, and write it down."""
        self.perhaps_die(last_words=lambda: self.recorder.record(Killed(self.name)))

    def watch(self, engine: Engine) -> None:
        """Write down what its node is, and whom it loses sight of."""
        self.recorder.record(Met(engine.origin, self.name))
        names = self.names

        def left(origin: int) -> None:
            if origin in names:
                self.recorder.record(Parted(self.name, names[origin]))

        class Listener:
            def put(self, event: object) -> None:
                if isinstance(event, PeerJoined):
                    names[event.peer.origin] = event.peer.name
                elif isinstance(event, PeerLeft):
                    left(event.peer.origin)

            def close(self) -> None:
                pass

        engine.add_listener(Listener())
        names.update({peer.origin: peer.name for peer in engine.peering.peers()})
        engine.on_link_lost.append(left)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + FINALE
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen that {what}"
        time.sleep(0.02)


# --- forwarders ------------------------------------------------------------------------------------


def forward(life: QueueLife) -> None:
    """Be the forwarder until all is over; what it says is left then is what is left on its disk."""

    async def main() -> None:
        path = life.folder / f"{life.role}.journal"
        async with Forwarder(path, name=life.name, bus=life.world.bus) as forwarder:
            life.watch(forwarder._engine)
            failed = asyncio.ensure_future(forwarder.failed())
            while life.stage.act < OVER and not life.leaving:
                await asyncio.wait([failed], timeout=0.05)
                if failed.done():
                    failed.result()
                life.stage.left = unsettled(forwarder)
            failed.cancel()
        if life.stage.act == OVER:
            async with Forwarder(path, name=life.name, bus=f"{life.world.bus}-after") as forwarder:
                await asyncio.sleep(0.2)  # it counts what is on its disk
                life.stage.left = unsettled(forwarder)

    Journal.open = partial(Journal.open, segment_bytes=SEGMENT_BYTES)  # type: ignore[method-assign]
    run_main(main())


def unsettled(forwarder: Forwarder) -> int:
    """Messages of all its queues."""
    left = 0
    for figures in forwarder.queues():
        counts = (figures.waiting, figures.in_flight, figures.delayed)
        assert min(counts) >= 0, f"a forwarder counts less than nothing: {figures}"
        left += 0 if figures.group else sum(counts)
    return left


# --- producers -------------------------------------------------------------------------------------


class Account:
    """What one origin has pushed, and what it was told of that."""

    def __init__(self, recorder: Recorder, origin: int) -> None:
        self.origin = origin
        self._recorder = recorder
        self.pushed = dict.fromkeys(QUEUES, 0)
        self._announced = dict.fromkeys(QUEUES, 0)
        self._kept: dict[str, int] = {}  # of streams that are a forwarder's since then

    def prepare(self, queue: str, count: int = 1) -> list[bytes | str]:
        """The values of the next messages, which are about to be pushed."""
        first = self.pushed[queue] + 1
        seqs = range(first, first + count)
        if seqs[-1] > self._announced[queue]:
            self._recorder.record(Pushing(queue, self.origin, self._announced[queue] + 1, seqs[-1]))
            self._announced[queue] = seqs[-1]
        return [value_of(queue, self.origin, seq) for seq in seqs]

    def done(self, queue: str, seq: int, count: int = 1) -> None:
        """They were pushed, the last as `seq`."""
        self.pushed[queue] += count
        assert seq == self.pushed[queue], f"{queue}: seq {seq}, expected {self.pushed[queue]}"

    def kept(self, queue: str, seq: int) -> None:
        """A durable push returned: what comes after it is not the producer's own any more."""
        before = self._kept.get(queue, seq - 1)
        if seq > before:
            self._recorder.record(Pushed(queue, self.origin, before + 1, seq))
            self._kept[queue] = seq

    def flushed(self, upto: dict[str, int]) -> None:
        """A flush returned."""
        for queue in self._kept:
            self.kept(queue, upto[queue])

    def close(self, remaining: int) -> None:
        """Its node is closed."""
        for queue, pushed in self.pushed.items():
            if self._announced[queue] > pushed:
                self._recorder.record(Refused(queue, self.origin, pushed + 1, self._announced[queue]))
        self._recorder.record(Closed(self.origin, remaining))


def produce(life: QueueLife, outbox: bool) -> None:
    """Push until told to stop, now and then as a new origin; then wait until all of it is in good hands."""
    asynchronous = life.rng.random() < 0.4 and not outbox
    over = False
    while not over and not life.leaving:
        over = asyncio.run(_produce_async(life)) if asynchronous else _produce(life, outbox)


def _options(life: QueueLife, outbox: bool, small: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"bus": life.world.bus, "name": life.name}
    if small:
        options |= {"history_bytes": 100_000, "buffer_bytes": 300_000}
    if outbox:
        options |= {"outbox": life.folder / f"{life.role}.outbox", "outbox_bytes": 16 << 20}
    return options


def _produce(life: QueueLife, outbox: bool) -> bool:
    """As one origin. Returns whether that was the last."""
    rng, keeps = life.rng, life.world.forwarder or outbox
    node = Node(**_options(life, outbox, small=rng.random() < 0.4))
    life.watch(node._engine)
    account = Account(life.recorder, node.origin)
    queues = rng.sample(QUEUES, rng.randint(1, 3))

    def durable(queue: str, timeout: float) -> bool:
        (value,) = account.prepare(queue)
        try:
            seq = node.push(queue, value, durable=True, timeout=timeout)
        except BufferFull:
            return False  # nothing was pushed
        except NotDurable as error:
            account.done(queue, error.seq or 0)
            return False
        account.done(queue, seq)
        account.kept(queue, seq)
        life.perhaps_be_gone()
        return True

    def flush(timeout: float) -> None:
        upto = dict(account.pushed)
        with contextlib.suppress(NotDurable):
            node.flush(timeout)
            account.flushed(upto)
            life.perhaps_be_gone()

    def one_by_one(queue: str) -> None:
        for _ in range(rng.randint(1, 10)):
            (value,) = account.prepare(queue)
            delay = rng.choice((None, None, 0.1, 0.5))
            with contextlib.suppress(BufferFull):
                account.done(queue, node.push(queue, value, delay=delay, timeout=rng.choice((None, 0.1))))
            life.pause(0.003)

    def burst(queue: str) -> None:
        values = account.prepare(queue, rng.randint(20, 200))
        if rng.random() < 0.5:
            account.done(queue, node.push_many(queue, values), len(values))
        else:
            for value in values:
                account.done(queue, node.push(queue, value))

    if outbox:  # which has a stream from its first durable message on
        for queue in queues:
            durable(queue, 5.0)
    while life.is_pushing and rng.random() > 0.02:
        queue, draw, patience = rng.choice(queues), rng.random(), rng.choice((0.02, 0.2, 1.0, 3.0))
        if draw < (0.4 if keeps else 0.9):
            rng.choice((one_by_one, one_by_one, burst))(queue)
        elif draw < 0.7 and keeps:
            durable(queue, patience)
        else:
            flush(patience)
        life.pause(PACE)
    over = life.stage.act != PLAYING and not life.leaving
    if over and keeps:
        for queue in queues:  # not at once, where the forwarder has yet to be met
            wait_until(partial(durable, queue, 5.0), f"{queue} is durable")
        flush(FINALE)
    if over and outbox:
        wait_until(lambda: node.statistics()["outbox_undelivered"] == 0, "the outbox is delivered")
    left = node.close(FINALE if over else rng.choice((0.1, 1.0)))
    remaining = sum(one.unacked for one in left)
    if not outbox:
        account.close(remaining)
    assert not over or not remaining, f"in the end there remained {left}"
    return over


async def _produce_async(life: QueueLife) -> bool:
    """The same in asyncio."""
    rng, keeps = life.rng, life.world.forwarder
    node = await AsyncNode(**_options(life, outbox=False, small=False)).open()
    life.watch(node._engine)
    account = Account(life.recorder, node.origin)
    queues = rng.sample(QUEUES, rng.randint(1, 3))

    async def durable(queue: str, timeout: float) -> bool:
        (value,) = account.prepare(queue)  # its seq is drawn before anything is waited for: there is always room
        seq = account.pushed[queue] = account.pushed[queue] + 1
        try:
            assert await node.push(queue, value, durable=True, timeout=timeout) == seq
        except NotDurable:
            return False
        account.kept(queue, seq)
        life.perhaps_be_gone()
        return True

    async def flush(timeout: float) -> None:
        upto = dict(account.pushed)
        with contextlib.suppress(NotDurable):
            await node.flush(timeout)
            account.flushed(upto)

    while life.is_pushing and rng.random() > 0.02:
        queue, draw, timeout = rng.choice(queues), rng.random(), rng.choice((0.05, 0.5, 2.0))
        if draw < (0.3 if keeps else 0.9):
            for value in account.prepare(queue, rng.randint(1, 60)):
                account.done(queue, await node.push(queue, value, delay=rng.choice((None, None, None, 0.3))))
        elif draw < 0.8 and keeps:
            await asyncio.gather(*(durable(rng.choice(queues), timeout) for _ in range(rng.choice((1, 5, 50)))))
        else:
            await flush(timeout)
        await asyncio.sleep(rng.uniform(0, PACE))
    over = life.stage.act != PLAYING and not life.leaving
    if over and keeps:
        deadline = time.monotonic() + FINALE
        while not all(await asyncio.gather(*(durable(queue, 5.0) for queue in queues))):
            assert time.monotonic() < deadline, f"{queues} are not durable"
        await flush(FINALE)
    left = await node.close(FINALE if over else rng.choice((0.1, 1.0)))
    remaining = sum(one.unacked for one in left)
    account.close(remaining)
    assert not over or not remaining, f"in the end there remained {left}"
    return over


# --- workers ---------------------------------------------------------------------------------------


class Diary:
    """What one session of a worker was given, and did. Threads may share it."""

    def __init__(self, life: QueueLife, lease: float) -> None:
        self._recorder, self._names = life.recorder, life.names
        life.sessions += 1
        self.session = f"{life.name}/{life.sessions}"
        self._met: set[int] = set()
        self._pending: list[Job] = []
        self._turn = threading.Lock()
        self._recorder.record(Joining(self.session, lease))

    def given(self, task: Task) -> Job:
        """What was drawn from the worker, and nothing done about it."""
        delivery: Any = task._held
        owner = delivery.tie.origin
        job = Job(owner, delivery.number, task.topic, task.origin, task.seq)
        events: list[Any] = [Given(self.session, owner, job.delivery, task.attempt, task.topic, task.origin, task.seq)]
        queue, origin, seq = task.topic, task.origin, task.seq
        if queue.startswith("$dead."):
            headers: Any = task.headers
            queue, origin, seq = headers["$queue"], headers["$origin"], headers["$seq"]
            events.append(Letter(job, queue, origin, seq, headers["$attempts"], headers["$reason"]))
        assert task.value == value_of(queue, origin, seq), f"{task} has another value than it was pushed with"
        if owner not in self._met and owner in self._names:
            self._met.add(owner)
            events.insert(0, Met(owner, self._names[owner]))
        self._recorder.record(*events)
        return job

    def handled(self, *jobs: Job) -> None:
        """They are done, and are about to be acknowledged. Afterwards say `acked`."""
        self._recorder.record(Handled(self.session, list(jobs)))

    def acked(self, *jobs: Job) -> None:
        with self._turn:
            self._pending += jobs

    def failing(self, job: Job, how: str) -> None:
        self._recorder.record(Failing(self.session, job, how))

    def extending(self, job: Job, seconds: float) -> None:
        self._recorder.record(Extending(self.session, job.owner, job.delivery, seconds))

    def flushing(self) -> list[Job]:
        """A flush begins: it is about these."""
        with self._turn:
            pending, self._pending = self._pending, []
        return pending

    def confirmed(self, jobs: list[Job]) -> None:
        """It returned."""
        self._recorder.record(Confirmed(self.session, jobs))

    def leaving(self) -> None:
        self._recorder.record(Leaving(self.session))


class Habits:
    """How a session of a worker works."""

    def __init__(self, life: QueueLife, pattern: str | None) -> None:
        rng = self.rng = life.rng
        self.life = life
        self.pattern = pattern or rng.choice(PATTERNS)
        self.lease = rng.choice(LEASES) if pattern != DEAD else 600.0
        self.credit = rng.choice(CREDITS)
        self.speed = rng.choice(SPEEDS)
        self.hoards = rng.random() < 0.3  # keeps several in hand, and settles them together, in another order
        self.fails = rng.choice((0.0, 0.02, 0.1)) if pattern != DEAD else 0.0
        self.most = rng.choice((3, 50, 500, 5000))
        self.hoard: deque[tuple[Task, Job]] = deque()

    def pause(self) -> float:
        """How long it takes, or for how long it does nothing at all."""
        if not self.life.is_pushing:
            return 0.0
        if self.lease < 10 and self.rng.random() < 0.005:
            return 1.5 * self.lease
        return self.rng.uniform(0, self.speed)

    def treat(self, diary: Diary, task: Task, job: Job) -> None:
        """Do it, or not."""
        rng = self.rng
        if self.life.is_pushing and rng.random() < self.fails:
            self.fail(diary, task, job)
            return
        if rng.random() < 0.01:
            seconds = self.lease * rng.choice((1.0, 2.0))
            diary.extending(job, seconds)
            task.extend(seconds)
        self.hoard.append((task, job))
        if not (self.hoards and self.life.is_pushing and len(self.hoard) < rng.randint(1, 40)):
            self.settle(diary)

    def settle(self, diary: Diary) -> None:
        """All that is in hand."""
        hoard, self.hoard = list(self.hoard), deque()
        self.rng.shuffle(hoard)
        if hoard:
            diary.handled(*(job for _, job in hoard))
            self.life.perhaps_be_gone()
            for task, job in hoard:
                task.ack()
                diary.acked(job)
            self.life.perhaps_be_gone()

    def fail(self, diary: Diary, task: Task, job: Job) -> None:
        """It is not done."""
        draw = self.rng.random()
        if draw < 0.7:
            diary.failing(job, "nack")
            task.nack(delay=self.rng.choice((0, 0.05, 0.3)), reason="not today")
        elif draw < 0.8:
            diary.failing(job, "reject")
            task.reject("never")
        else:
            diary.failing(job, "return")
            with contextlib.suppress(KeyboardInterrupt), task:
                raise KeyboardInterrupt
        self.life.perhaps_be_gone()


def work(life: QueueLife, pattern: str | None = None) -> None:
    """Work, in several sessions, until told to stop. `pattern`: what to pull; else one or another."""
    while life.is_working:
        life.rng.choice((_work, _work, _work_together, _work_async))(life, pattern)


def _work(life: QueueLife, pattern: str | None) -> None:
    rng = life.rng
    with Node(life.name, bus=life.world.bus) as node:
        life.watch(node._engine)
        while life.is_working and rng.random() > 0.1:
            habits = Habits(life, pattern)
            diary = Diary(life, habits.lease)
            worker = node.pull(habits.pattern, credit=habits.credit, lease=habits.lease)
            for _ in range(habits.most):
                task = worker.get(0.1)
                if task is not None:
                    job = diary.given(task)
                    time.sleep(habits.pause())
                    habits.treat(diary, task, job)
                else:
                    habits.settle(diary)
                    if not life.is_working:
                        break
                if rng.random() < 0.02:
                    about = diary.flushing()
                    with contextlib.suppress(NotSettled):
                        worker.flush(rng.choice((0.01, 1.0, 5.0)))
                        diary.confirmed(about)
                        life.perhaps_be_gone()
            diary.leaving()
            worker.close(rng.choice((0.0, 2.0)))


def _work_together(life: QueueLife, pattern: str | None) -> None:
    """Two threads share a worker."""
    habits = Habits(life, pattern)
    habits.hoards = False

    def labour(rng: Random) -> None:
        for _ in range(habits.most):
            if not life.is_working:
                break
            task = worker.get(0.1)
            if task is not None:
                job = diary.given(task)
                time.sleep(rng.uniform(0, habits.speed) if life.is_pushing else 0.0)
                if life.is_pushing and rng.random() < habits.fails:
                    diary.failing(job, "nack")
                    task.nack(delay=0)
                else:
                    diary.handled(job)
                    with task:
                        pass
                    diary.acked(job)
            elif rng.random() < 0.2:
                about = diary.flushing()
                with contextlib.suppress(NotSettled):
                    worker.flush(1.0)
                    diary.confirmed(about)

    with Node(life.name, bus=life.world.bus) as node:
        life.watch(node._engine)
        diary = Diary(life, habits.lease)
        worker = node.pull(habits.pattern, credit=habits.credit, lease=habits.lease)
        with ThreadPoolExecutor(2) as threads:
            works = [threads.submit(labour, Random(life.rng.random())) for _ in range(2)]
        for done in works:
            done.result()
        diary.leaving()
        worker.close()


def _work_async(life: QueueLife, pattern: str | None) -> None:
    rng = life.rng

    async def main() -> None:
        async with AsyncNode(life.name, bus=life.world.bus) as node:
            life.watch(node._engine)
            while life.is_working and rng.random() > 0.1:
                habits = Habits(life, pattern)
                diary = Diary(life, habits.lease)
                worker = await node.pull(habits.pattern, credit=habits.credit, lease=habits.lease)
                for _ in range(habits.most):
                    task = await worker.get(0.1)
                    if task is not None:
                        job = diary.given(task)
                        await asyncio.sleep(habits.pause())
                        habits.treat(diary, task, job)
                    else:
                        habits.settle(diary)
                        if not life.is_working:
                            break
                    if rng.random() < 0.02:
                        about = diary.flushing()
                        with contextlib.suppress(NotSettled):
                            await worker.flush(rng.choice((0.01, 1.0, 5.0)))
                            diary.confirmed(about)
                diary.leaving()
                await worker.close(rng.choice((0.0, 2.0)))

    run_main(main())
