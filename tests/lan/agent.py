"""A program that has some nodes, and does with them what it reads from stdin; `agents.py` drives it.

    {"do": "open", "node": "a", "options": {"bus": "x"}}       one JSON object a line, one answer a line, in order
    {"ok": {"origin": 1234, …}}                                or {"error": "AuthError", "text": "…"}

What it publishes on a stream is the seq itself, so that whoever receives can check each value, not only its number.
Of what it receives it keeps, per stream, the ranges that came, in the order in which they came.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from typing import Any

import zmqbus
from zmqbus import Node, Subscription

BURST_S = 0.002  # how often a paced publisher publishes what has become due


class Ear:
    """Consumes one subscription on a thread of its own, and takes notes."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.wrong: list[str] = []  # values that are not the seq that they came with
        self.streams: dict[tuple[str, int], list[list[int]]] = {}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        streams = self.streams
        for message in self.subscription:
            value = message.value[0] if isinstance(message.value, list) else message.value
            if value != message.seq and len(self.wrong) < 20:
                self.wrong.append(f"{message.topic}#{message.seq} is {value!r}")
            ranges = streams.setdefault((message.topic, message.origin), [])
            if ranges and ranges[-1][1] + 1 == message.seq:
                ranges[-1][1] = message.seq
            else:
                ranges.append([message.seq, message.seq])

    def report(self) -> dict[str, Any]:
        """What came, what was lost."""
        return {
            "streams": [[topic, origin, ranges] for (topic, origin), ranges in list(self.streams.items())],
            "gaps": [[gap.topic, gap.origin, gap.first, gap.last] for gap in self.subscription.gaps],
            "lost": self.subscription.lost,
            "repaired": self.subscription.repaired,
            "wrong": self.wrong,
        }


class Spring:
    """Publishes on one topic at a pace, on a thread of its own, until told to stop or `count` is reached."""

    def __init__(self, node: Node, topic: str, rate: float, count: int | None, size: int) -> None:
        self.last = 0
        self._send = node.publisher(topic).send
        self._rate, self._count, self._padding = rate, count, "x" * size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._flow, daemon=True)
        self._thread.start()

    def _flow(self) -> None:
        begin = time.monotonic()
        while not self._stop.is_set():
            due = int((time.monotonic() - begin) * self._rate) + 1
            if self._count is not None:
                due = min(due, self._count)
            while self.last < due and not self._stop.is_set():
                seq = self.last + 1
                assert self._send([seq, self._padding] if self._padding else seq) == seq
                self.last = seq
            if self.last == self._count:
                return
            self._stop.wait(BURST_S)

    def wait(self) -> int:
        """Wait until `count` is reached."""
        self._thread.join()
        return self.last

    def stop(self) -> int:
        """Stop, and say what the last seq was."""
        self._stop.set()
        return self.wait()


class Agent:
    """The nodes of this process, and the verbs: every method without underscore."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._events: dict[str, list[dict[str, Any]]] = {}
        self._ears: dict[str, Ear] = {}
        self._springs: dict[str, Spring] = {}

    def open(self, node: str, options: dict[str, Any]) -> dict[str, Any]:
        """Open a node and listen to its events; times are monotonic, the same for all hosts of a Lan."""
        opened = self._nodes[node] = Node(node, **options)
        events = self._events[node] = []
        stream = opened.events()

        def listen() -> None:
            for event in stream:
                entry: dict[str, Any] = {"at": time.monotonic(), "kind": type(event).__name__}
                if isinstance(event, (zmqbus.PeerJoined, zmqbus.PeerLeft)):
                    entry["peer"] = event.peer.name
                    entry["origin"] = event.peer.origin
                entry["reason"] = getattr(event, "reason", "")
                entry["name"] = getattr(event, "name", "")
                events.append(entry)

        threading.Thread(target=listen, daemon=True).start()
        return {"origin": opened.origin, "endpoints": opened.endpoints}

    def close(self, node: str) -> list[str]:
        """Close a node; returns who had not confirmed everything."""
        return [undelivered.peer for undelivered in self._nodes.pop(node).close()]

    def peers(self, node: str) -> list[list[Any]]:
        """[name, origin, inbox] of each peer."""
        return [[peer.name, peer.origin, peer.inbox] for peer in self._nodes[node].peers()]

    def endpoints(self, node: str) -> dict[str, str]:
        """Where a node can be reached now."""
        return self._nodes[node].endpoints

    def census(self) -> dict[str, int]:
        """How many peers each node has."""
        return {name: len(node.peers()) for name, node in self._nodes.items()}

    def wait_for_peers(self, node: str, n: int, timeout: float) -> int:
        """Wait for peers."""
        return len(self._nodes[node].wait_for_peers(n, timeout))

    def wait_for_subscribers(self, node: str, topic: str, n: int, timeout: float) -> int:
        """Wait for subscribers."""
        return self._nodes[node].wait_for_subscribers(topic, n, timeout)

    def events(self, node: str) -> list[dict[str, Any]]:
        """All events since it was opened."""
        return list(self._events[node])

    def subscribe(self, node: str, ear: str, patterns: list[str], **options: Any) -> None:
        """Subscribe, and consume from now on."""
        self._ears[ear] = Ear(self._nodes[node].subscribe(*patterns, **options))

    def report(self, ear: str) -> dict[str, Any]:
        """What a subscription has received and lost."""
        return self._ears[ear].report()

    def publish(self, node: str, topic: str, count: int) -> int:
        """Publish the next `count` seqs in a row; returns the last."""
        publisher = self._nodes[node].publisher(topic)
        for _ in range(count):
            publisher.send(publisher.seq + 1)
        return publisher.seq

    def greet(self, node: str, topic: str, count: int) -> None:
        """Publish the seqs 1 to `count` the moment that the first peer joins."""
        opened = self._nodes[node]
        stream = opened.events()

        def wait() -> None:
            for event in stream:
                if isinstance(event, zmqbus.PeerJoined):
                    for number in range(1, count + 1):
                        opened.publish(topic, number)
                    return

        threading.Thread(target=wait, daemon=True).start()

    def flow(self, node: str, topic: str, rate: float, count: int | None = None, size: int = 0) -> None:
        """Publish at a pace, in the background."""
        self._springs[topic] = Spring(self._nodes[node], topic, rate, count, size)

    def wait_flow(self, topic: str) -> int:
        """Wait until a flow has reached its count; returns the last seq."""
        return self._springs[topic].wait()

    def flowed(self, topic: str) -> int:
        """How far a flow has come: its last seq."""
        return self._springs[topic].last

    def stop_flow(self, topic: str) -> int:
        """Stop a flow; returns the last seq."""
        return self._springs[topic].stop()

    def statistics(self, node: str) -> dict[str, int | float]:
        """Counters."""
        return self._nodes[node].statistics()


def main() -> None:
    """Serve until stdin ends; then close what is open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    agent = Agent()
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("do")
        try:
            answer = {"ok": getattr(agent, verb)(**command)}
        except Exception as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)
    for name in list(agent._nodes):
        agent.close(name)


if __name__ == "__main__":
    main()
