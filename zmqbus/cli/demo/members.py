"""Those of the demo's processes that need no forwarder: shippers, and the aggregators that follow them.

Each is a process of its own with one node. It reports facts over a pipe, as dicts, and is told what to do next, as
tuples: ("meet", others), ("rate", per second), ("spike",), ("where",), ("stop",),
("guard", process ids …), ("finish", heads).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from zmqbus.errors import SetupError
from zmqbus.net.clock import now, sleep

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node
    from zmqbus.node.faces.subscription import Subscription
    from zmqbus.node.publishing.publisher import Publisher

LINE_BYTES_MAX = 16 * 1024
# A stopped aggregator misses something once the queues on the way to it are full: 512 batches, and some megabytes in
# the kernel. This is more.
SPIKE_LINES = 250_000
SPIKE_RATE = 125_000  # per second
TICK = 0.01  # shippers send what is due so often
REPORT = 0.1  # facts come so often
START_TIMEOUT = 30.0  # a busy machine takes its time to start a dozen of processes
CONFIRM = 15.0  # for aggregators to confirm to a leaving shipper
IDLE = 3.0  # an aggregator that has heard nothing for so long will not hear the rest either


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file, again and again: a short log makes up for it, a counter is read anew."""
    found = True
    while found:
        found = False
        with open(path, "rb") as file:
            while line := file.readline(LINE_BYTES_MAX):
                found = True
                yield line.rstrip(b"\r\n").decode(errors="replace")
    raise SetupError(f"{path} has become empty")


@contextlib.contextmanager
def member(pipe: Connection, bus: str, name: str) -> Iterator[Node]:
    """A node on the loopback interface. What goes wrong is reported; without the director there is nothing to do."""
    from zmqbus.node.faces.node import Node

    try:
        with Node(name, bus=bus, interface="127.0.0.1") as node:
            pipe.send({"up": now()})
            yield node
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send({"failed": f"{type(error).__name__}: {error}"})


@contextlib.contextmanager
def _guard() -> Iterator[list[int]]:
    """Stopped processes, which would stay for ever if the director vanished: then, they are ended."""
    wards: list[int] = []
    try:
        yield wards
    except (EOFError, ConnectionError):
        for process in wards:
            os.kill(process, signal.SIGKILL)
        raise


def ship(pipe: Connection, bus: str, name: str, topic: str, path: Path) -> None:
    """Ship lines at the rate asked for, or as fast as possible, until told to stop."""
    with member(pipe, bus, name) as node:
        publisher = node.publisher(topic)
        lines = lines_of(path)
        rate, began, base, report_at = 0, now(), 0, 0.0
        while True:
            match pipe.recv() if pipe.poll(TICK) else None:
                case ("meet", int(others)):
                    node.wait_for_peers(others, START_TIMEOUT)
                    pipe.send({"met": now()})
                case ("rate", int(per_second)):
                    rate, began, base = per_second, now(), publisher.seq
                case ("spike",):
                    spike(publisher, lines, lambda: pipe.send({"sent": publisher.seq}))
                    began, base = now(), publisher.seq
                    pipe.send({"spiked": True})
                case ("where",):
                    pipe.send({"where": publisher.seq})
                case ("stop",):
                    break
            for _ in range(min(base + int((now() - began) * rate) - publisher.seq, rate)):
                publisher.send(next(lines))
            if now() >= report_at:
                report_at = now() + REPORT
                pipe.send({"sent": publisher.seq})
        sent = publisher.seq
        late = node.close(CONFIRM)
        pipe.send({"sent": sent, "origin": node.origin, "unconfirmed": [one.peer for one in late], "stopped": True})
        with contextlib.suppress(EOFError):
            pipe.recv()


def spike(publisher: Publisher, lines: Iterator[str], report: Callable[[], None]) -> None:
    """Many lines in a short time; not as fast as possible, which would be too fast for any reader in Python."""
    began, sent, report_at = now(), 0, 0.0
    while sent < SPIKE_LINES:
        due = min(SPIKE_LINES, int((now() - began) * SPIKE_RATE)) - sent
        for line in islice(lines, due):
            publisher.send(line)
        sent += due
        if now() >= report_at:
            report_at = now() + REPORT
            report()
        sleep(TICK / 10)


class Seen:
    """What an aggregator got of one stream. `disorder` counts what came twice, or not in order."""

    __slots__ = ("disorder", "first", "following", "received")

    def __init__(self, seq: int) -> None:
        self.first = self.following = seq
        self.received = self.disorder = 0

    def note(self, seq: int) -> None:
        """One message. What was left out shows in the sum."""
        if seq < self.following:
            self.disorder += 1
        else:
            self.following = seq + 1
            self.received += 1


def follow(pipe: Connection, bus: str, name: str, history: int) -> None:
    """Take in everything, and report on it, until told how much there was."""
    with member(pipe, bus, name) as node, _guard() as wards:
        _, others = pipe.recv()
        node.wait_for_peers(others, START_TIMEOUT)
        subscription = node.subscribe("logs.>", history=history)
        pipe.send({"met": now()})
        streams: dict[tuple[str, int], Seen] = {}
        heads: dict[tuple[str, int], int] | None = None
        began = heard_at = now()
        report_at = 0.0
        while heads is None or (now() - heard_at < IDLE and any(_behind(streams, heads))):
            message = subscription.get(REPORT / 2)
            while message is not None:
                key = (message.topic, message.origin)
                seen = streams.get(key)
                if seen is None:
                    seen = streams[key] = Seen(message.seq)
                seen.note(message.seq)
                heard_at = now()
                if heard_at >= report_at:
                    break
                message = subscription.get(0)
            if now() >= report_at:
                report_at = now() + REPORT
                pipe.send(_facts(streams, subscription))
            match pipe.recv() if pipe.poll() else None:
                case ("guard", *processes):
                    wards[:] = processes
                case ("finish", heads):
                    heard_at = now()
        ranges = [(gap.topic, gap.origin, gap.first, gap.last) for gap in subscription.gaps]
        per_stream = {key: (seen.first, seen.received, seen.disorder) for key, seen in streams.items()}
        pipe.send(_facts(streams, subscription) | {"streams": per_stream, "gaps": ranges, "seconds": heard_at - began})
        with contextlib.suppress(EOFError):
            pipe.recv()


def _facts(streams: dict[tuple[str, int], Seen], subscription: Subscription) -> dict[str, int]:
    received = sum(seen.received for seen in streams.values())
    return {"received": received, "repaired": subscription.repaired, "lost": subscription.lost}


def _behind(streams: dict[tuple[str, int], Seen], heads: dict[tuple[str, int], int]) -> Iterator[bool]:
    return (key not in streams or streams[key].following <= last for key, last in heads.items())
