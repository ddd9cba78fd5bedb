"""The owners and workers that `queue` compares. Worker tasks: each runs in a process of its own.

An owner tells its endpoint, and begins when it is told to, or when all workers have said that they are there. A worker
connects to it, and does what comes until its parent says `end`. The loops are as plain as a user would write them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Thread
from time import perf_counter, sleep
from typing import Any

import zmq

from bench.child import Parent, rss_bytes

QUEUE = "bench.jobs"
CONNECT_S = 20.0
DONE_S = 120.0
POLL = 0.002  # seconds between two looks whether all is done
WARM_UP = 100  # rounds before those that count
REPORT = 0.05  # seconds between two reports of what was done
HELD = 8  # jobs of the one who does nothing with them
BUFFER_BYTES = 512 * 1024 * 1024  # for a backlog in memory

# --- raw pyzmq -----------------------------------------------------------------------------------


def _bound(kind: int) -> tuple[Any, str]:
    socket: Any = zmq.Context().socket(kind)
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = 0
    return socket, f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


def raw_owner(parent: Parent, size: int, count: int, workers: int, credit: int, whole: bool) -> None:
    """ROUTER: fills each worker's credit, then answers each acknowledgement with the next job.

    `whole`: by `send_multipart` and `recv_multipart`, as everybody writes it; else frame by frame.
    """
    socket, endpoint = _bound(zmq.ROUTER)
    parent.tell(endpoint=endpoint)
    send, recv, more, value = socket.send, socket.recv, zmq.SNDMORE, bytes(size)
    there = []
    while len(there) < workers:
        there.append(recv())
        recv()
    credit = min(credit, count // workers)
    start = perf_counter()
    for worker in there * credit:
        send(worker, more)
        send(value)
    if whole:
        send_multipart, recv_multipart = socket.send_multipart, socket.recv_multipart
        for _ in range(count - credit * workers):
            worker, _ack = recv_multipart()
            send_multipart((worker, value))
        for _ in range(credit * workers):
            recv_multipart()
    else:
        for _ in range(count - credit * workers):
            worker = recv()
            recv()
            send(worker, more)
            send(value)
        for _ in range(credit * workers):
            recv()
            recv()
    parent.tell(seconds=perf_counter() - start)
    parent.hear()


def raw_worker(parent: Parent, endpoint: str, whole: bool = False, takes: float = 0.0) -> None:
    """DEALER: says that it is there, and then of each job that it is done."""
    socket: Any = zmq.Context().socket(zmq.DEALER)
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = 0
    socket.connect(endpoint)
    send, recv = socket.send, socket.recv_multipart if whole else socket.recv
    send(b"")
    while True:
        recv()
        if takes:
            sleep(takes)
        send(b"")


def raw_asker(parent: Parent, size: int, rounds: int, pause: float) -> None:
    """ROUTER: one job, and its acknowledgement; µs of each."""
    socket, endpoint = _bound(zmq.ROUTER)
    parent.tell(endpoint=endpoint)
    send, recv, value = socket.send, socket.recv, bytes(size)
    worker = recv()
    recv()
    times = []
    for _ in range(WARM_UP + rounds):
        sleep(pause)
        start = perf_counter()
        send(worker, zmq.SNDMORE)
        send(value)
        recv()
        recv()
        times.append((perf_counter() - start) * 1e6)
    parent.tell(times=times[WARM_UP:])
    parent.hear()


def raw_dealer(parent: Parent, size: int, count: int, workers: int, patience: float | None) -> None:
    """DEALER: deals all jobs out in turn, and waits for all acknowledgements, or until none has come for so long."""
    socket, endpoint = _bound(zmq.DEALER)
    parent.tell(endpoint=endpoint)
    for _ in range(workers):
        socket.recv()
    value, start = bytes(size), perf_counter()
    for _ in range(count):
        socket.send(value)
    if patience is not None:
        parent.tell(sent=count)
    done, last = 0, start
    while done < count and socket.poll(None if patience is None else int(patience * 1000)):
        socket.recv()
        done, last = done + 1, perf_counter()
    parent.tell(seconds=last - start, lost=count - done)
    parent.hear()


# --- zmqbus: owners --------------------------------------------------------------------------------


def _node(name: str, bus: str, endpoint: str | None, **options: Any) -> Any:
    from zmqbus import Node

    peers = [] if endpoint is None else [endpoint]
    return Node(name, bus=bus, interface="127.0.0.1", discovery="static", peers=peers, **options)


def _until(condition: Callable[[], bool], patience: float = DONE_S) -> None:
    deadline = perf_counter() + patience
    while not condition():
        if perf_counter() > deadline:
            raise TimeoutError
        sleep(POLL)


class _Owner:
    """What the owner of the queue says of it: the forwarder, if there is one, or the node itself."""

    def __init__(self, node: Any, by_forwarder: bool) -> None:
        self._node = node
        self._by_forwarder = by_forwarder
        if by_forwarder:
            _until(lambda: any(peer.journal for peer in node.peers()), CONNECT_S)

    def figures(self) -> Any:
        """Of the queue; None: there is nothing yet."""
        from zmqbus.node.faces.asking import ask, own_queues
        from zmqbus.protocol.commands import Statistics, Stats

        if self._by_forwarder:
            [forwarder] = [peer.origin for peer in self._node.peers() if peer.journal]
            answer = ask(self._node, {forwarder: Stats()}, CONNECT_S).get(forwarder)
            queues = answer.queues if isinstance(answer, Statistics) else []
        else:
            queues = own_queues(self._node)
        return next((one for one in queues if one.topic == QUEUE and not one.group), None)

    def has_done(self, count: int) -> bool:
        """So many."""
        figures = self.figures()
        return figures is not None and figures.done >= count


def owner(parent: Parent, bus: str, endpoint: str | None, size: int) -> None:
    """`node.push(queue, value)` in a loop, or `push_many`; until all is done."""
    with _node("owner", bus, endpoint) as node:
        queue = _Owner(node, endpoint is not None)
        parent.tell(endpoint=node.endpoints["inbox"])
        order = parent.hear()
        assert order is not None
        count, value = order["count"], bytes(size)
        start = perf_counter()
        if order["by"] == "push":
            push = node.push
            for _ in range(count):
                push(QUEUE, value)
        else:
            values = [value] * 500
            for _ in range(count // 500):
                node.push_many(QUEUE, values)
            node.push_many(QUEUE, values[: count % 500])
        _until(lambda: queue.has_done(count))
        parent.tell(seconds=perf_counter() - start, redelivered=queue.figures().redelivered)
        parent.hear()


def asker(parent: Parent, bus: str, size: int, rounds: int, pause: float) -> None:
    """One job at a time: µs from `push` until its acknowledgement is here."""
    with _node("owner", bus, None) as node:
        parent.tell(endpoint=node.endpoints["inbox"])
        parent.hear()
        settled: list[float] = []
        desk = node._engine.jobs._desk  # there is no public way to know this without asking for it, which would cost
        settle = desk.settle

        def note(*arguments: Any) -> None:
            settled.append(perf_counter())
            settle(*arguments)

        desk.settle = note
        value, times = bytes(size), []
        for number in range(1, WARM_UP + rounds + 1):
            sleep(pause)
            start = perf_counter()
            node.push(QUEUE, value)
            while len(settled) < number:
                sleep(pause)
            times.append((settled[-1] - start) * 1e6)
        parent.tell(times=times[WARM_UP:])
        parent.hear()


def holder(parent: Parent, bus: str, endpoint: str | None, size: int, count: int) -> None:
    """Pushes much that nobody does; reports its memory then."""
    with _node("owner", bus, endpoint, buffer_bytes=BUFFER_BYTES) as node:
        queue = _Owner(node, endpoint is not None)
        parent.tell(endpoint=node.endpoints["inbox"])
        parent.hear()
        values = [bytes(size)] * 500
        for _ in range(count // 500):
            node.push_many(QUEUE, values)
        node.flush(DONE_S)
        _until(lambda: (found := queue.figures()) is not None and found.waiting + found.in_flight >= count - 500)
        parent.tell(rss=rss_bytes())
        parent.hear()
        os._exit(0)  # what waits need not be waited for


# --- zmqbus: workers -------------------------------------------------------------------------------


def worker(parent: Parent, bus: str, endpoint: str) -> None:
    """`for job in worker: with job`."""
    done = 0
    with _node("worker", bus, endpoint) as node:
        node.wait_for_peers(1, CONNECT_S)
        with node.pull(QUEUE) as jobs:

            def end() -> None:
                jobs.flush(DONE_S)
                parent.tell(done=done)

            _on_order(parent, end)
            parent.tell(ready=True)
            for job in jobs:
                with job:
                    done += 1


def careful_worker(parent: Parent, bus: str, endpoint: str, takes: float, credit: int | None) -> None:
    """Takes its time for each job, and reports which it has done, and in the end how long they took."""
    ended: list[None] = []
    with _node("worker", bus, endpoint) as node:
        node.wait_for_peers(1, CONNECT_S)
        with node.pull(QUEUE, credit=credit) as jobs:
            _on_order(parent, lambda: ended.append(None))
            parent.tell(ready=True)
            seqs: list[int] = []
            spent, done, report_at = 0.0, 0, 0.0
            while not ended:
                job = jobs.get(REPORT)
                if job is not None:
                    start = perf_counter()
                    with job:
                        sleep(takes)
                    spent, done = spent + perf_counter() - start, done + 1
                    seqs.append(job.seq)
                if seqs and (job is None or perf_counter() >= report_at):
                    report_at = perf_counter() + REPORT
                    parent.tell(seqs=seqs)
                    seqs = []
            parent.tell(seqs=seqs, takes=spent / done if done else 0.0)


def idler(parent: Parent, bus: str, endpoint: str) -> None:
    """Has some jobs, and does nothing with them."""
    with _node("worker", bus, endpoint) as node:
        node.wait_for_peers(1, CONNECT_S)
        with node.pull(QUEUE, credit=HELD) as jobs:
            parent.tell(ready=True)
            held = []
            while True:
                held.append(jobs.get())


def _on_order(parent: Parent, do: Callable[[], None]) -> None:
    """Do this when the parent says so, while the main thread works on. Without a parent there is nothing to do."""

    def listen() -> None:
        try:
            parent.hear()
        except SystemExit:
            os._exit(0)
        do()

    Thread(target=listen, daemon=True).start()
