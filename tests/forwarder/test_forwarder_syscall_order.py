"""A forwarder under strace: no ACK leaves by any socket before its messages, and the names of their files, are on disk.

The ACKs are read from the bytes that the forwarder gives to its sockets, as ZMTP carries them; the rules are those of
tests/journal/kernel/syscall_order.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from journal_writer import mark
from syscall_order import Call, parse_trace, strace, verify

from tests.forwarder import forwarders
from zmqbus import Node
from zmqbus.errors import RemoteProtocolError
from zmqbus.protocol.commands import Ack, decode_command

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4  # flags of a ZMTP 3 frame
TOPICS = ("logs.a", "logs.b", "metrics.cpu")
BYTES_MAX = 2 << 20  # of the journal: segments of 512 KiB


class Acks:
    """The marks that a forwarder's ACKs tell of, once the last byte of an ACK has been given to the kernel."""

    def __init__(self) -> None:
        self._streams: dict[str, bytes] = {}
        self._parts: dict[str, list[bytes]] = {}
        self._acked: dict[tuple[bytes, int], int] = {}

    def __call__(self, call: Call) -> Iterator[bytes]:
        if not call.path.startswith("socket:") or not call.data:
            return
        if call.path not in self._streams and call.data[:1] != b"\xff":
            return  # not a ZMTP connection from its beginning: mDNS, or the system's wake-ups
        for message in self._messages(call):
            try:
                command = decode_command(message[-1])
            except RemoteProtocolError:
                continue  # a frame of the PUB, or a subscription
            if isinstance(command.body, Ack):
                for topic, seq in command.body.heads:
                    stream = topic, command.body.origin
                    for told in range(self._acked.get(stream, 0) + 1, seq + 1):
                        yield mark(topic.decode(), command.body.origin, told)
                    self._acked[stream] = max(self._acked.get(stream, 0), seq)

    def _messages(self, call: Call) -> Iterator[list[bytes]]:
        data = self._streams.get(call.path, b"") + call.data
        known = call.path in self._parts
        if not known and len(data) >= GREETING_BYTES:
            data = data[GREETING_BYTES:]
            self._parts[call.path] = []
            known = True
        while known and len(data) >= 2:
            head = 9 if data[0] & LONG else 2
            size = int.from_bytes(data[1:head], "big")
            if len(data) < head + size:
                break
            flags, frame, data = data[0], data[head : head + size], data[head + size :]
            if flags & COMMAND:
                continue
            self._parts[call.path].append(frame)
            if not flags & MORE:
                yield self._parts[call.path]
                self._parts[call.path] = []
        self._streams[call.path] = data


def test_no_ack_leaves_before_its_messages_are_on_disk(tmp_path: Path, bus: str) -> None:
    journal, rng = tmp_path / "journal", Random(1)
    options = json.dumps({"bus": bus, "name": "forwarder", "bytes_max": BYTES_MAX})
    process = subprocess.Popen(
        [*strace(tmp_path / "trace"), sys.executable, forwarders.__file__, str(journal), options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    published = dict.fromkeys(TOPICS, 0)
    try:
        with Node("publisher", bus=bus) as node:
            for turn in range(60):
                for _ in range(1 if turn % 3 == 0 else rng.randint(2, 20)):
                    topic = rng.choice(TOPICS)
                    published[topic] += 1
                    value = mark(topic, node.origin, published[topic]) + b"x" * rng.choice((0, 100, 5000))
                    node.publish(topic, value, durable=turn % 3 == 0, timeout=30)
                node.flush(timeout=30)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the forwarder's end, and with it that of strace: killing strace would leave it running
        ended = process.wait(30)
    assert ended == 0
    order = verify(parse_trace((tmp_path / "trace").read_text()), journal=str(journal), told=Acks(), finished=True)
    assert order.violations == []
    assert order.told == sum(published.values()) > 300
    assert order.syncs > 60
    assert len(list(journal.glob("*.zbj"))) >= 2, "it should have changed segments"
