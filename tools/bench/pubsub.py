"""Throughput: one publisher, one or more subscribers, against raw pyzmq doing the same. The loops are in faces.py.

Each round runs every contender once, one after the other; a round's rate is that of its slowest subscriber. The raw
baseline is run both ways that lose nothing, without a limit and with one at which the sender waits; what is compared
with is the faster of the two, by its median.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.crew import Crew
from bench.results import Budget, Line, Table

SIZES = {"16": 16, "100": 100, "1k": 1024, "64k": 65536, "1m": 1048576}
NAMES = {16: "16 B", 100: "100 B", 1024: "1 KiB", 65536: "64 KiB", 1048576: "1 MiB"}
COUNTS = {16: 1_000_000, 100: 1_000_000, 1024: 400_000, 65536: 20_000, 1048576: 1000}  # about a second of raw pyzmq
COUNTS_ASYNC = {16: 50_000, 100: 50_000, 1024: 50_000, 65536: 15_000, 1048576: 1000}  # the same of zmq.asyncio
QUICK = 20  # times fewer

SYNC_BUDGETS = {16: 2.3, 100: 2.3, 1024: 1.4, 65536: 0.95, 1048576: 0.95}
ASYNC_BUDGETS = {100: 30.0}
CURVE_BUDGET = 0.6

Progress = Callable[[str], None]


@dataclass
class Contender:
    """One way of doing it, and what its runs gave."""

    label: str
    face: str  # the pair of tasks in faces.py
    arguments: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    send_rates: list[float] = field(default_factory=list)
    send_ns: list[float] = field(default_factory=list)
    receive_ns: list[float] = field(default_factory=list)
    lost: int = 0
    repaired: int = 0

    def run(self, size: int, count: int, fan: int) -> None:
        """One run."""
        bus = f"bench-{secrets.token_hex(4)}"
        node = "node" in self.face
        with Crew() as crew:
            common = {"bus": bus, **self.arguments} if node else self.arguments
            sending: dict[str, Any] = {"size": size, "count": count, **({"receivers": fan} if node else {})}
            sender = crew.start(f"bench.faces:{self.face}_sender", **common, **sending)
            endpoint = sender.hear()["endpoint"]
            receiving = {name: value for name, value in common.items() if name != "by"}
            receiving.update({"endpoint": endpoint, "count": count, **({} if node else {"size": size})})
            receivers = [crew.start(f"bench.faces:{self.face}_receiver", **receiving) for _ in range(fan)]
            for receiver in receivers:
                receiver.hear()
            sender.tell(go=True)
            sent = sender.hear()
            got = [receiver.hear() for receiver in receivers]
            sender.tell(end=True)
            used = sender.hear()
        lost = sum(report["lost"] for report in got)
        self.rates.append(0.0 if lost else (count - 1) / max(report["seconds"] for report in got))
        self.send_rates.append(count / sent["seconds"])
        self.send_ns.append(used["cpu_s"] / count * 1e9)
        self.receive_ns.append(median(report["cpu_s"] for report in got) / count * 1e9)
        self.lost += lost
        self.repaired += sum(report["repaired"] for report in got)


def measure(
    sizes: Sequence[int],
    fans: Sequence[int],
    faces: Iterable[str],
    runs: int,
    quick: bool,
    key: str | None,
    progress: Progress,
) -> list[Table]:
    """Tables for each of `faces` ("sync", "async") and `fans`. `key`: file of a bus key, to measure CURVE too."""
    tables = []
    for face in faces:
        for fan in fans:
            table = Table(f"publish-subscribe, 1→{fan}, {'Node' if face == 'sync' else 'AsyncNode'}")
            table.notes.append(f"messages/s at the {'slowest ' * (fan > 1)}subscriber, first to last message")
            for size in sizes:
                table.lines += _size(face, size, fan, runs, quick, key, progress)
            if face == "sync" and fan == 1:
                table.notes.append("raw: pyzmq PUB send(bytes) / SUB recv(), one frame, TCP loopback")
            tables.append(table)
    return tables


def _size(face: str, size: int, fan: int, runs: int, quick: bool, key: str | None, progress: Progress) -> list[Line]:
    raw_face, node_face, raw_name = {
        "sync": ("raw", "node", "pyzmq"),
        "async": ("raw_async", "async_node", "zmq.asyncio"),
    }[face]
    raws = [
        Contender(f"{raw_name}, no HWM", raw_face, {"bounded": False}),
        Contender(f"{raw_name}, NODROP", raw_face, {"bounded": True}),
    ]
    ours = [
        Contender("publish(topic, value)", node_face, {"key": None, "by": "publish"}),
        Contender("publisher(topic).send(value)", node_face, {"key": None, "by": "send"}),
        Contender("publisher(topic).send_many(values)", node_face, {"key": None, "by": "send_many"}),
    ]
    curve = [Contender("publish, bus key (CURVE)", node_face, {"key": key, "by": "publish"})] if key else []
    scale = QUICK if quick else 1
    for number in range(runs):
        for contender in [*raws, *ours, *curve]:
            progress(f"1→{fan} {face} {NAMES[size]}: run {number + 1}/{runs}, {contender.label}")
            counts = COUNTS_ASYNC if contender.face == "raw_async" else COUNTS
            contender.run(size, max(100, counts[size] // scale), fan)
    raw = max(raws, key=lambda contender: median(contender.rates))
    budgets = (SYNC_BUDGETS if face == "sync" else ASYNC_BUDGETS) if fan == 1 else {}
    limit = budgets.get(size)
    lines = [
        _line(contender, size, raw, Budget("ratio", at_least=limit) if limit is not None else None)
        for contender in ours
    ]
    lines += [_line(contender, size, ours[0], Budget("ratio", at_least=CURVE_BUDGET)) for contender in curve]
    return lines


def _line(ours: Contender, size: int, raw: Contender, budget: Budget | None) -> Line:
    return Line(
        label=f"{NAMES[size]}, {ours.label}",
        unit="/s",
        ours=ours.rates,
        raw=raw.rates,
        raw_name=raw.label if raw.face != ours.face else "without key",
        budget=budget,
        lost=ours.lost,
        repaired=ours.repaired,
        details={
            "publisher_rate": median(ours.send_rates),
            "publisher_cpu_ns": median(ours.send_ns),
            "subscriber_cpu_ns": median(ours.receive_ns),
            "raw_publisher_rate": median(raw.send_rates),
            "raw_publisher_cpu_ns": median(raw.send_ns),
            "raw_subscriber_cpu_ns": median(raw.receive_ns),
        },
    )
