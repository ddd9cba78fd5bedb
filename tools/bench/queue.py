"""Queues: jobs given to workers and acknowledged one by one, beside the same by bare ROUTER and DEALER sockets.

The raw loop is the least that one can do: an owner's ROUTER fills each worker's credit of 100, and then answers each
acknowledgement with the next job, to whoever sent it; a worker receives and acknowledges. It knows no leases, retries,
attempts, values or headers, and a worker that dies takes its jobs along. It is run in two ways: with multipart calls,
as everybody writes it, and frame by frame, which is several times quicker and more than most know. Tasks of the worker
processes are in jobs.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from time import perf_counter
from typing import Any

from bench.crew import Crew, Worker
from bench.durable import scratch
from bench.results import Budget, Line, Table, percentile

SIZE = 100
WORKERS = 4
CREDIT = 100  # of raw workers
COUNT, COUNT_RAW = 500_000, 200_000  # one or two seconds of each
ROUNDS = 2000
PAUSE = 0.0005  # seconds between two of them
UNEVEN = 3000  # jobs, for two fast workers and a slow one
FAST_S, SLOW_S = 0.0005, 0.02  # that they take for each
KILL_CREDIT = 8
KILL_AFTER = 3  # jobs of the slow worker
BACKLOG = 1_000_000
QUICK = 20  # times fewer
DONE_S = 120.0
MIB = 1024 * 1024
RATIO, RATE, LATENCY, SPREAD, OWNER_MIB, FORWARDER_MIB = 4.0, 250e3, 3.0, 1.5, 300.0, 150.0  # budgets

Progress = Callable[[str], None]


def measure(directory: str | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Tables. `directory`: on the disk to be measured."""
    scale = QUICK if quick else 1
    return [
        _throughput(directory, runs, scale, progress),
        _latency(runs, scale, progress),
        _uneven(runs, scale, progress),
        _backlog(directory, runs, scale, progress),
    ]


def _bus() -> str:
    return f"bench-{secrets.token_hex(4)}"


# --- throughput ----------------------------------------------------------------------------------


def _throughput(directory: str | None, runs: int, scale: int, progress: Progress) -> Table:
    raw: list[float] = []
    raw_frames: list[float] = []
    ours: dict[str, list[float]] = {"push": [], "push_many": []}
    stored: list[float] = []
    for number in range(runs):
        progress(f"queue: run {number + 1}/{runs}")
        raw.append(_raw_rate(COUNT_RAW // scale, whole=True))
        raw_frames.append(_raw_rate(COUNT_RAW // scale, whole=False))
        for by, rates in ours.items():
            rates.append(_rate(COUNT // scale, by))
        with scratch(directory) as path:
            stored.append(_rate(COUNT // scale, "push_many", path))
    name = f"ROUTER/DEALER, credit {CREDIT}"
    budget = Budget("ratio", at_least=RATIO)
    return Table(
        f"work queue, 1→{WORKERS}, each job acknowledged",
        [f"{SIZE} B; jobs/s from the first push until all acknowledgements are confirmed, by a forwarder when on disk"],
        [
            Line("no forwarder, push(queue, value)", "/s", ours["push"], raw, name, budget=budget),
            Line("no forwarder, push_many(queue, values)", "/s", ours["push_many"], raw, name, budget=budget),
            Line("the same", "/s", ours["push_many"], raw_frames, "ROUTER/DEALER, frame by frame"),
            Line("through a forwarder, fsynced", "/s", stored, raw, name, budget=Budget("value", at_least=RATE)),
        ],
    )


def _raw_rate(count: int, whole: bool) -> float:
    with Crew() as crew:
        loop = {"size": SIZE, "count": count, "workers": WORKERS, "credit": CREDIT, "whole": whole}
        owner = crew.start("bench.jobs:raw_owner", **loop)
        endpoint = owner.hear()["endpoint"]
        for _ in range(WORKERS):
            crew.start("bench.jobs:raw_worker", endpoint=endpoint, whole=whole)
        return count / float(owner.hear()["seconds"])


def _rate(count: int, by: str, path: str | None = None) -> float:
    """Jobs/s. `path`: through a forwarder with its journal there."""
    bus = _bus()
    with Crew() as crew:
        forwarder = crew.start("bench.durable:forwarder", path=path, bus=bus) if path is not None else None
        endpoint = forwarder.hear()["endpoint"] if forwarder is not None else None
        owner = crew.start("bench.jobs:owner", bus=bus, endpoint=endpoint, size=SIZE)
        endpoint = owner.hear()["endpoint"]
        workers = [crew.start("bench.jobs:worker", bus=bus, endpoint=endpoint) for _ in range(WORKERS)]
        for worker in workers:
            worker.hear()
        start = perf_counter()
        owner.tell(count=count, by=by)
        owner.hear(DONE_S)
        done = 0
        for worker in workers:
            worker.tell(end=True)
        for worker in workers:
            done += worker.hear(DONE_S)["done"]
        seconds = perf_counter() - start
    return count / seconds if done >= count else 0.0


# --- latency -------------------------------------------------------------------------------------


def _latency(runs: int, scale: int, progress: Progress) -> Table:
    raw, ours = [], []
    for number in range(runs):
        progress(f"queue, one job at a time: run {number + 1}/{runs}")
        with Crew() as crew:
            owner = crew.start("bench.jobs:raw_asker", size=SIZE, rounds=ROUNDS // scale, pause=PAUSE)
            crew.start("bench.jobs:raw_worker", endpoint=owner.hear()["endpoint"])
            raw.append(owner.hear()["times"])
        bus = _bus()
        with Crew() as crew:
            owner = crew.start("bench.jobs:asker", bus=bus, size=SIZE, rounds=ROUNDS // scale, pause=PAUSE)
            worker = crew.start("bench.jobs:worker", bus=bus, endpoint=owner.hear()["endpoint"])
            worker.hear()
            owner.tell(go=True)
            ours.append(owner.hear()["times"])
    return Table(
        "one job, from idle to done: push, do, acknowledge",
        [f"{SIZE} B, at a low rate, until the acknowledgement is with the owner; raw: there and back"],
        [
            Line(
                f"Node, p{percent}",
                "µs",
                [percentile(times, percent) for times in ours],
                [percentile(times, percent) for times in raw],
                "ROUTER/DEALER",
                budget=Budget("ratio", at_most=LATENCY) if percent == 50 else None,
            )
            for percent in (50, 99)
        ],
    )


# --- a slow worker, and a killed one ---------------------------------------------------------------


def _uneven(runs: int, scale: int, progress: Progress) -> Table:
    count = UNEVEN // scale
    progress("queue, one slow worker: bare DEALER")
    bare_s, _ = _bare(count, kill=False)
    _, bare_lost = _bare(count, kill=True)
    seconds, ideal, lost, again = [], [], 0, []
    killed_lost = 0
    for number in range(runs):
        progress(f"queue, one slow worker: run {number + 1}/{runs}")
        done_s, ideal_s, missing, _ = _spread(count, kill=False)
        seconds.append(done_s)
        ideal.append(ideal_s)
        lost += missing
        _, _, missing, redelivered = _spread(count, kill=True)
        again.append(float(redelivered))
        killed_lost += missing
    within = Budget("ratio", at_most=SPREAD)
    credit = Budget("value", at_most=KILL_CREDIT)
    return Table(
        f"{count:,} jobs, two fast workers and a slow one ({FAST_S * 1e3:g} and {SLOW_S * 1e3:g} ms a job)",
        [
            "the ideal: nobody is idle before all is done",
            f"killed: with -9, in mid-work, credit {KILL_CREDIT}",
            f"bare DEALER: one run; it loses {bare_lost:,} jobs with the one that is killed",
        ],
        [
            Line("all done after", "s", seconds, ideal, "the ideal", budget=within, lost=lost),
            Line("the same", "s", seconds, [bare_s], "bare DEALER", comparable=False),
            Line("slow one killed: given out again", "jobs", again, budget=credit, lost=killed_lost),
        ],
    )


def _spread(count: int, kill: bool) -> tuple[float, float, int, int]:
    """Seconds until all was done, what they would be ideally, jobs never done, and jobs given out again."""
    bus = _bus()
    with Crew() as crew:
        owner = crew.start("bench.jobs:owner", bus=bus, endpoint=None, size=SIZE)
        endpoint = owner.hear()["endpoint"]
        credit = KILL_CREDIT if kill else None
        fast, other, slow = (
            crew.start("bench.jobs:careful_worker", bus=bus, endpoint=endpoint, takes=takes, credit=credit)
            for takes in (FAST_S, FAST_S, SLOW_S)
        )
        for worker in (fast, other, slow):
            worker.hear()
        owner.tell(count=count, by="push")
        seqs: set[int] = set()
        if kill:
            seqs |= _follow(slow, KILL_AFTER)
            slow.kill()
        report = owner.hear(DONE_S)
        takes = []
        for worker in (fast, other) if kill else (fast, other, slow):
            worker.tell(end=True)
            facts: dict[str, Any] = {}
            while "takes" not in facts:
                facts = worker.hear()
                seqs.update(facts["seqs"])
            if facts["takes"]:
                takes.append(facts["takes"])
    ideal = count / sum(1 / one for one in takes)
    return report["seconds"], ideal, count - len(seqs), report["redelivered"]


def _follow(worker: Worker, jobs: int) -> set[int]:
    """What it has done, once that is so much."""
    seqs: set[int] = set()
    while len(seqs) < jobs:
        seqs.update(worker.hear()["seqs"])
    return seqs


def _bare(count: int, kill: bool) -> tuple[float, int]:
    """The same by a DEALER that deals to all in turn: seconds, and jobs lost."""
    with Crew() as crew:
        owner = crew.start("bench.jobs:raw_dealer", size=SIZE, count=count, workers=3, patience=2.0 if kill else None)
        endpoint = owner.hear()["endpoint"]
        *_, slow = (
            crew.start("bench.jobs:raw_worker", endpoint=endpoint, takes=takes) for takes in (FAST_S, FAST_S, SLOW_S)
        )
        if kill:
            owner.hear()
            slow.kill()
        report = owner.hear(DONE_S)
    return report["seconds"], report["lost"]


# --- what waits ------------------------------------------------------------------------------------


def _backlog(directory: str | None, runs: int, scale: int, progress: Progress) -> Table:
    count = BACKLOG // scale
    own = Line("the node that pushed them", "MiB", budget=Budget("value", at_most=OWNER_MIB))
    stored = Line("a forwarder", "MiB", budget=Budget("value", at_most=FORWARDER_MIB))
    for number in range(min(runs, 3)):
        progress(f"queue, backlog: run {number + 1}")
        with Crew() as crew:
            own.ours.append(_hold(crew, _bus(), None, count))
        bus = _bus()
        with scratch(directory) as path, Crew() as crew:
            forwarder = crew.start("bench.durable:forwarder", path=path, bus=bus)
            _hold(crew, bus, forwarder.hear()["endpoint"], count)
            forwarder.tell(report=True)
            stored.ours.append(forwarder.hear()["rss"] / MIB)
    return Table(
        f"resident memory with {count:,} jobs that wait", [f"{SIZE} B; a worker has some of them"], [own, stored]
    )


def _hold(crew: Crew, bus: str, endpoint: str | None, count: int) -> float:
    """Have so many jobs wait; MiB of the node that pushed them."""
    holder = crew.start("bench.jobs:holder", bus=bus, endpoint=endpoint, size=SIZE, count=count)
    inbox = holder.hear()["endpoint"]
    crew.start("bench.jobs:idler", bus=bus, endpoint=endpoint or inbox).hear()
    holder.tell(go=True)
    return float(holder.hear(DONE_S)["rss"]) / MIB
