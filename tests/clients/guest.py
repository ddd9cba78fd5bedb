"""A subscriber that repairs. Written from docs/protocol.md, with nothing but pyzmq and msgpack.

    guest.py INBOX TOPIC COUNT [--lose N]

It is a guest: it has no inbox of its own. It prints "ready" once it is registered, then "SEQ VALUE" (the value as
JSON) for each message of TOPIC, in order and without a hole, and at the end "fetched N". With `--lose` it throws away
each N-th frame that it receives, as a network might.
"""

from __future__ import annotations

import argparse
import json
import secrets
import struct
import time

import msgpack
import zmq

HEADER = struct.Struct("<BBHIQQQ")
ENVELOPE = struct.Struct("<BBQII")
DATA, HEAD = 1, 2
HEADERS, EXTERNAL, RAW = 1, 2, 4
HELLO, WELCOME, BYE, SUBSCRIBE, HEADS, FETCH, BATCHES, ERROR = 1, 2, 3, 4, 6, 7, 8, 255
IDLE_MS = 50


class Guest:
    """One topic of one publisher."""

    def __init__(self, inbox: str, topic: str, lose: int) -> None:
        self.topic = topic.encode()
        self.lose = lose
        self.next = 0  # the seq to deliver next; 0 until HEADS said where to begin
        self.target = 0  # one past the last that is known to exist
        self.held: dict[int, object] = {}
        self.asked = False
        self.fetched = 0
        self.frames = 0
        self.peer = 0
        self.requests = 0
        context = zmq.Context()
        self.dealer = context.socket(zmq.DEALER)
        self.sub = context.socket(zmq.SUB)
        self.host = inbox.rpartition(":")[0]
        self.dealer.connect(inbox)
        self.sub.subscribe(self.topic + b"\0")
        self.poller = zmq.Poller()
        self.poller.register(self.dealer, zmq.POLLIN)
        self.poller.register(self.sub, zmq.POLLIN)

    # --- commands --------------------------------------------------------------------------------

    def ask(self, command: int, **body: object) -> None:
        self.requests += 1
        packed = msgpack.packb(body)
        self.dealer.send(ENVELOPE.pack(command, 1, self.requests, 0, len(packed)) + packed)

    def hello(self) -> None:
        self.ask(
            HELLO,
            origin=secrets.randbits(64) or 1,
            name="guest",
            bus="default",
            epoch=time.time_ns(),
            inbox=[],
            pub_port=1,
            host="here",
            pid=1,
            release="none",
        )

    def answered(self, answer: bytes) -> None:
        command, _, _, number, size = ENVELOPE.unpack_from(answer)
        at = ENVELOPE.size + 4 * number
        sizes = struct.unpack_from(f"<{number}I", answer, ENVELOPE.size)
        body, at = msgpack.unpackb(answer[at : at + size]), at + size
        if command == WELCOME:
            self.peer = body["origin"]
            self.sub.connect(f"{self.host}:{body['pub_port']}")
            self.ask(SUBSCRIBE, id=1, patterns=[self.topic.decode()])
        elif command == HEADS:
            following = dict(map(tuple, body["heads"])).get(self.topic, 1)
            if not self.next:
                self.next = self.target = following
            self.target = max(self.target, following)
            if not body.get("more", False):
                print("ready", flush=True)
        elif command == BATCHES:
            self.asked = False
            parts = []
            for size in sizes:
                parts.append(answer[at : at + size])
                at += size
            rest = iter(parts)
            for frame in rest:
                external = next(rest) if self.flags(frame) & EXTERNAL else None
                self.fetched += self.take(frame, external)
            if missing := [seq for seq in range(self.next, body["last"] + 1) if seq not in self.held]:
                raise SystemExit(f"lost: {missing}")
        elif command == ERROR:
            raise SystemExit(f"error {body['code']}: {body['reason']}")

    # --- frames ----------------------------------------------------------------------------------

    def flags(self, frame: bytes) -> int:
        return HEADER.unpack_from(frame, frame.index(0) + 1)[2]

    def take(self, frame: bytes, external: bytes | None) -> int:
        """Take the messages of a frame that are new; returns how many."""
        cut = frame.index(0) + 1
        version, kind, flags, count, origin, first, _ = HEADER.unpack_from(frame, cut)
        assert (version, origin) == (1, self.peer)
        if kind == HEAD:
            self.target = max(self.target, first)
        if kind != DATA:
            return 0
        payload = frame[cut + HEADER.size :] if external is None else external
        values = [payload] if flags & RAW else msgpack.unpackb(payload, strict_map_key=False)
        if flags & HEADERS:
            values, headers = values
            assert len(headers) == count
        assert len(values) == count
        self.target = max(self.target, first + count)
        new = 0
        for seq, value in enumerate(values, first):
            if seq >= self.next and seq not in self.held:
                self.held[seq] = value
                new += 1
        return new

    def received(self, parts: list[bytes]) -> None:
        self.frames += 1
        if self.next and not (self.lose and self.frames % self.lose == 0):
            self.take(parts[0], parts[1] if len(parts) > 1 else None)

    # --- the loop --------------------------------------------------------------------------------

    def run(self, count: int) -> None:
        self.hello()
        while count:
            events = dict(self.poller.poll(IDLE_MS))
            if self.dealer in events:
                self.answered(self.dealer.recv())
            if self.sub in events:
                self.received(self.sub.recv_multipart())
            while count and self.next in self.held:
                value = self.held.pop(self.next)
                print(self.next, json.dumps(value, default=bytes.hex), flush=True)
                self.next += 1
                count -= 1
            # What is held proves a gap at once; what only a head told of may still be under way.
            if self.next < self.target and not self.asked and (self.held or not events):
                last = min(self.held, default=self.target) - 1
                self.asked = True
                self.ask(FETCH, topic=self.topic, origin=self.peer, first=self.next, last=last, bytes=10_000)
        self.ask(BYE)
        command = 0
        while command != BYE:
            command = ENVELOPE.unpack_from(self.dealer.recv())[0]
        print("fetched", self.fetched, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("inbox")
    parser.add_argument("topic")
    parser.add_argument("count", type=int)
    parser.add_argument("--lose", type=int, default=0)
    given = parser.parse_args()
    Guest(given.inbox, given.topic, given.lose).run(given.count)
