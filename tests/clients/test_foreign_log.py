"""Forwarders and strangers, who know docs/protocol.md alone: one that reads the log, one that publishes durably."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.clients.test_clients import headers, value
from tests.clients.test_foreign_node import DATA, HEAD, ORIGIN, TOPIC, Foreign, frame
from tests.forwarder.forwarders import Running, running, stored
from tests.node.conftest import eventually
from zmqbus import Node

READER = Path(__file__).with_name("reader.py")
ACK, ASKS = 9, 1
PLACE: dict[str, Any] = {"interface": "127.0.0.1", "discovery": "static"}


@pytest.fixture
def forwarder(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "journal", **PLACE) as forwarder:
        yield forwarder


def inbox(forwarder: Running) -> str:
    return forwarder.forwarder.endpoints["inbox"]


# --- one that reads ------------------------------------------------------------------------------


def reader(forwarder: Running, *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, str(READER), inbox(forwarder), *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def read(forwarder: Running, *arguments: str) -> list[str]:
    """What the reader prints until it ends."""
    with reader(forwarder, *arguments) as process:
        try:
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    return output.splitlines()


def lines(forwarder: Running, topic: str) -> list[str]:
    """What it is to print for what is on disk, of one topic."""
    return [
        f"{message.offset} {message.topic} {message.seq} {json.dumps(message.value, default=bytes.hex)}"
        for message in stored(forwarder.path, topic)
    ]


def publish(forwarder: Running, count: int) -> None:
    with Node("publisher", peers=[inbox(forwarder)], **PLACE) as node:
        for seq in range(1, count + 1):
            node.publish("logs.a", value(seq), headers=headers(seq))
            node.publish("logs.b", seq)
        node.publish("logs.b", "last", durable=True, timeout=15)
        node.flush(timeout=15)


@pytest.mark.parametrize("credit", ["1", "100000", "10000000"])
def test_it_reads_all_there_is_and_what_comes(forwarder: Running, credit: str) -> None:
    publish(forwarder, 100)
    with reader(forwarder, "logs.a", "200", "--credit", credit) as process:
        try:
            assert process.stdout is not None
            first = [process.stdout.readline() for _ in range(101)]
            assert first[0] == "reads from 0\n"
            publish(forwarder, 100)
            rest, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    found = [line.rstrip("\n") for line in first[1:]] + rest.splitlines()
    assert len(found) == 200
    assert found == lines(forwarder, "logs.a")


def test_it_goes_on_where_its_cursor_is_in_the_middle_of_a_batch(forwarder: Running) -> None:
    publish(forwarder, 60)
    found: list[str] = []
    for count in (1, 2, 17, 41):
        first, *messages, last = read(forwarder, "logs.b", str(count), "--cursor", "stranger")
        assert first == f"reads from {int(found[-1].split()[0]) + 1 if found else 0}"
        assert len(messages) == count
        assert last == f"committed {int(messages[-1].split()[0]) + 1}"
        found += messages
    assert found == lines(forwarder, "logs.b")


def test_who_reads_under_the_same_name_takes_over(forwarder: Running) -> None:
    publish(forwarder, 5)
    with reader(forwarder, "logs.b", "1000", "--cursor", "stranger") as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "reads from 0\n"
            assert [first.stdout.readline() for _ in range(6)] == [f"{line}\n" for line in lines(forwarder, "logs.b")]
            with reader(forwarder, "logs.b", "1000", "--cursor", "stranger") as second:
                try:
                    assert first.stdout.readline() == "taken\n"
                    assert first.wait(10) == 0
                    assert second.poll() is None
                finally:
                    second.kill()
        finally:
            first.kill()


# --- one that publishes --------------------------------------------------------------------------


class Publisher(Foreign):
    """It hears acknowledgements, too."""

    def __init__(self) -> None:
        self.acks: list[dict[str, Any]] = []
        self.hellos: list[dict[str, Any]] = []
        super().__init__()

    def answers(self, command: int, body: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any], list[bytes]]]:
        if command == ACK:
            self.acks.append(body)
        elif command == 1:
            self.hellos.append(body)
        return super().answers(command, body)

    def acked(self) -> int:
        """How far TOPIC is acknowledged."""
        heads = [dict(map(tuple, ack.get("heads", []))) for ack in self.acks if ack["origin"] == ORIGIN]
        return max((head.get(TOPIC, 0) for head in heads), default=0)


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[tuple[Publisher, Running]]:
    """A foreign publisher of three messages, of which it holds two, and a forwarder that has met it."""
    foreign = Publisher()
    try:
        foreign.heads[TOPIC] = 4
        foreign.held = {seq: frame(seq, msgpack.packb([f"old {seq}"])) for seq in (2, 3)}
        with running(tmp_path / "journal", topics=["t.>"], peers=[foreign.inbox], **PLACE) as forwarder:
            foreign.join(inbox(forwarder))
            while foreign.pub.recv() != b"\1t.":
                pass
            foreign.beat()
            yield foreign, forwarder
    finally:
        foreign.close()


def test_what_it_publishes_is_journaled_and_acknowledged(publisher: tuple[Publisher, Running]) -> None:
    foreign, forwarder = publisher
    eventually(lambda: foreign.acked() == 3)  # from its history, as far as that goes
    assert (foreign.hellos[0]["role"], foreign.hellos[0]["claims"]) == ("forwarder", ["t.>", "$dead.t.>"])
    foreign.publish(frame(4, msgpack.packb(["new"])))
    foreign.publish(frame(5, kind=HEAD, count=0, flags=ASKS))
    eventually(lambda: foreign.acked() == 4)
    assert {ack["journal"] for ack in foreign.acks} == {foreign.hellos[0]["journal"]}
    found = [(message.seq, message.value) for message in stored(forwarder.path)]
    assert found == [(2, "old 2"), (3, "old 3"), (4, "new")]
    count = len(foreign.acks)
    foreign.publish(frame(5, kind=HEAD, count=0))  # as if the ACK had been lost
    eventually(lambda: len(foreign.acks) > count)
    assert foreign.acks[-1]["heads"] == [[TOPIC, 4]]


@pytest.mark.parametrize("first", [2**62 + 1, 2**64 - 2])
def test_a_seq_that_no_honest_stream_comes_to_does_not_stop_a_forwarder(
    publisher: tuple[Publisher, Running], first: int, caplog: pytest.LogCaptureFixture
) -> None:
    foreign, _ = publisher
    eventually(lambda: foreign.acked() == 3)
    strange = struct.pack("<BBHIQQQ", 1, DATA, 0, 1, ORIGIN, first, 10**18) + msgpack.packb(["strange"])
    foreign.publish(b"t.strange\0" + strange)
    foreign.publish(frame(4, msgpack.packb(["new"])))
    foreign.publish(frame(5, kind=HEAD, count=0, flags=ASKS))
    eventually(lambda: foreign.acked() == 4)
    assert not [record for record in caplog.records if record.name == "asyncio"]  # nor does it leave a traceback


def test_a_count_that_its_payload_cannot_hold_is_refused(
    publisher: tuple[Publisher, Running], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is decoded on its way to the disk, but a batch takes as many offsets as it says that it has messages."""
    foreign, forwarder = publisher
    eventually(lambda: foreign.acked() == 3)
    foreign.publish(frame(4, msgpack.packb(["new"])))
    foreign.publish(frame(5, msgpack.packb(["strange"]), count=2**32 - 1))
    foreign.held |= {4: frame(4, msgpack.packb(["new"])), 5: frame(5, msgpack.packb(["good"]))}
    foreign.publish(frame(6, kind=HEAD, count=0, flags=ASKS))
    eventually(lambda: foreign.acked() == 5)  # the HEAD told of one, and it was fetched
    assert [(message.offset, message.value) for message in stored(forwarder.path)][2:] == [(2, "new"), (3, "good")]
    assert not [record for record in caplog.records if record.name == "asyncio"]
