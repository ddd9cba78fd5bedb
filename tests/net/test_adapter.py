"""FdWatch: no message sleeps behind a lost edge, a budget gives others a turn, and failures are survived."""

import asyncio
import functools
import itertools
import sys
import threading

import pytest
import zmq

from zmqbus.net import adapter
from zmqbus.net.adapter import FdWatch

PATIENCE_S = 10.0  # how long a test waits for a condition before it fails; never reached in good health


def on_loop(test):
    """Run an `async def` test on a loop of its own."""

    @functools.wraps(test)
    def run(**fixtures):
        asyncio.run(test(**fixtures))

    return run


@pytest.fixture
def pair():
    """Two connected PAIR sockets. By inproc: the FD behaves the same, and nothing needs a port."""
    context = zmq.Context()
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind("inproc://pair")
    right.connect("inproc://pair")
    yield left, right
    context.destroy(linger=0)


class Sink:
    """Drains a socket into `received`, at most `budget` messages a turn."""

    def __init__(self, socket, budget=1_000_000):
        self.socket = socket
        self.budget = budget
        self.received = []
        self.calls = 0
        self.stirred = asyncio.Event()

    def drain(self):
        self.calls += 1
        self.stirred.set()
        for _ in range(self.budget):
            try:
                self.received.append(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return False
        return True

    async def holds(self, count):
        async with asyncio.timeout(PATIENCE_S):
            while len(self.received) < count:
                self.stirred.clear()
                await self.stirred.wait()


async def settled():
    """The loop has polled its FDs, and run what that scheduled, several times over."""
    for _ in range(10):
        await asyncio.sleep(0)


class Reports:
    """What reached the loop's exception handler."""

    def __init__(self):
        self.contexts = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.contexts.append(context))


@on_loop
async def test_delivers_what_comes(pair):
    left, right = pair
    sink = Sink(right)
    watch = FdWatch(asyncio.get_running_loop(), right, sink.drain)
    for number in range(100):
        left.send(b"%d" % number)
        await sink.holds(number + 1)
    assert sink.received == [b"%d" % number for number in range(100)]
    watch.close()


@on_loop
async def test_delivers_what_waited_before_the_watch(pair):
    left, right = pair
    left.send(b"early")
    assert right.poll(PATIENCE_S * 1000)  # looks, and so takes the edge
    sink = Sink(right)
    watch = FdWatch(asyncio.get_running_loop(), right, sink.drain)
    await sink.holds(1)
    watch.close()


@on_loop
async def test_check_saves_a_message_whose_edge_a_send_took(pair):
    """The lost edge itself: the message waits, the FD is silent. Only `check` brings it out."""
    left, right = pair
    loop = asyncio.get_running_loop()
    sink = Sink(right)
    watch = FdWatch(loop, right, sink.drain)
    await settled()
    left.send(b"waiting")
    right.send(b"a send looks, and so takes the edge")
    right.getsockopt(zmq.EVENTS)
    calls = sink.calls
    await settled()  # the loop finds nothing
    assert sink.calls == calls
    watch.check()
    await sink.holds(1)
    watch.close()


@on_loop
async def test_becoming_writable_stirs_even_when_its_edge_was_taken():
    context = zmq.Context()
    dealer, router = context.socket(zmq.DEALER), context.socket(zmq.ROUTER)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    sink = Sink(dealer)
    watch = FdWatch(asyncio.get_running_loop(), dealer, sink.drain)
    await settled()
    assert sink.calls == 0
    dealer.connect("inproc://router")
    router.bind("inproc://router")
    assert dealer.poll(PATIENCE_S * 1000, zmq.POLLOUT)  # looks, and so takes the edge
    watch.check()
    watch.check()
    for _ in range(10):
        await asyncio.sleep(0)
        watch.check()
    assert sink.calls == 1
    watch.close()
    context.destroy(linger=0)


@on_loop
async def test_a_send_at_the_end_of_drain_loses_nothing(pair):
    """Replies sent after the last recv may take the edge of what came meanwhile; the watch asks again."""
    left, right = pair
    received = []
    done = asyncio.Event()

    def drain():
        try:
            while True:
                received.append(right.recv(zmq.NOBLOCK))
        except zmq.Again:
            pass
        if received and len(received) < 50:
            left.send(b"next")  # arrives after the last recv …
            right.send(b"reply")  # … and this takes its edge
        elif received:
            done.set()
        return False

    watch = FdWatch(asyncio.get_running_loop(), right, drain)
    left.send(b"first")
    async with asyncio.timeout(PATIENCE_S):
        await done.wait()
    assert len(received) == 50
    watch.close()


@on_loop
async def test_budget_gives_other_work_a_turn(pair):
    left, right = pair
    loop = asyncio.get_running_loop()
    for _ in range(100):
        left.send(b"x")
    sink = Sink(right, budget=10)
    seen = []

    def other_work():
        seen.append(len(sink.received))
        if len(sink.received) < 100:
            loop.call_soon(other_work)

    watch = FdWatch(loop, right, sink.drain)
    loop.call_soon(other_work)
    await sink.holds(100)
    steps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    assert max(steps) == 10  # never two budgets in a row
    watch.close()


@on_loop
async def test_a_drain_that_asks_for_another_turn_gets_it(pair):
    """Even when the socket is empty: a drain may keep work of its own."""
    _, right = pair
    loop = asyncio.get_running_loop()
    turns = []

    def drain():
        turns.append(len(turns))
        return len(turns) < 5

    watch = FdWatch(loop, right, drain)
    await settled()
    assert len(turns) == 5
    watch.close()


@on_loop
async def test_an_exception_is_reported_and_survived(pair):
    left, right = pair
    reports = Reports()
    sink = Sink(right)
    failures = iter([ValueError("bad message")])

    def drain():
        try:
            sink.received.append(right.recv(zmq.NOBLOCK))
        except zmq.Again:
            return False
        finally:
            sink.stirred.set()
        for error in failures:
            raise error
        return True

    watch = FdWatch(asyncio.get_running_loop(), right, drain)
    for number in range(3):
        left.send(b"%d" % number)
    await sink.holds(3)  # the two behind the bad one come without another edge
    assert [str(context["exception"]) for context in reports.contexts] == ["bad message"]
    assert "drain failed" in reports.contexts[0]["message"]
    watch.close()


@on_loop
async def test_a_drain_that_always_raises_does_not_take_the_loop(pair, monkeypatch):
    left, right = pair
    monkeypatch.setattr(adapter, "RETRY_S", 3600.0)
    reports = Reports()

    def drain():
        raise RuntimeError("always")

    watch = FdWatch(asyncio.get_running_loop(), right, drain)
    for _ in range(50):
        left.send(b"x")
        await asyncio.sleep(0)
    assert len(reports.contexts) == 1
    watch.close()


@on_loop
async def test_close_is_final_and_may_be_repeated(pair):
    left, right = pair
    sink = Sink(right)
    watch = FdWatch(asyncio.get_running_loop(), right, sink.drain)
    left.send(b"x")
    watch.check()  # a drain is scheduled …
    watch.close()
    watch.close()
    watch.check()
    left.send(b"y")
    await settled()
    assert sink.received == []  # … and does not come
    assert "closed" in repr(watch)


@on_loop
async def test_drain_may_close_its_watch(pair):
    left, right = pair
    reports = Reports()
    calls = []

    def drain():
        calls.append(right.recv())
        watch.close()
        right.close()
        return True

    watch = FdWatch(asyncio.get_running_loop(), right, drain)
    left.send(b"x")
    async with asyncio.timeout(PATIENCE_S):
        while not calls:
            await asyncio.sleep(0)
    await settled()
    assert calls == [b"x"]
    assert reports.contexts == []


@on_loop
async def test_a_socket_closed_under_its_watch_is_reported_once(pair):
    _, right = pair
    reports = Reports()
    watch = FdWatch(asyncio.get_running_loop(), right, lambda: False)
    await settled()
    right.close()
    watch.check()
    watch.check()
    assert ["closed before its watch" in context["message"] for context in reports.contexts] == [True]
    assert "closed" in repr(watch)


@on_loop
async def test_what_another_thread_takes_the_signal_of_is_received(pair):
    """It uses the socket for something else just when a message has come."""
    left, right = pair
    lock = threading.Lock()
    sink = Sink(right)

    def drain():
        with lock:
            return Sink.drain(sink)

    watch = FdWatch(asyncio.get_running_loop(), right, drain, lock)
    for turn in range(200):
        left.send(b"%d" % turn)

        def use():
            with lock:
                right.getsockopt(zmq.EVENTS)
            watch.check_from_afar()

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()  # the loop has had no turn
        await sink.holds(turn + 1)
    watch.close()


def test_a_main_runs_on_the_loop_of_nodes():
    async def main():
        return type(asyncio.get_running_loop()).__module__

    loop = adapter.new_loop()
    assert adapter.run_main(main()) == type(loop).__module__
    loop.close()


def test_without_uvloop_it_is_the_loop_of_asyncio(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loop = adapter.new_loop()
    assert isinstance(loop, asyncio.SelectorEventLoop)
    loop.close()
