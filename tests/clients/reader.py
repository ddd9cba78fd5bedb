"""A reader of the log. Written from docs/protocol.md, with nothing but pyzmq and msgpack.

    reader.py INBOX PATTERN COUNT [--cursor NAME] [--credit BYTES]

It is a guest: it has no inbox of its own. It prints "reads from OFFSET" when its reading has begun, then "OFFSET TOPIC
SEQ VALUE" (the value as JSON) for each message, from the oldest on or from where the cursor is; what it has printed it
commits. After COUNT messages it prints "committed OFFSET" and ends; "taken" if another reader took its cursor over.
"""

from __future__ import annotations

import argparse
import json
import secrets
import struct
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import zmq

HEADER = struct.Struct("<BBHIQQQ")
ENVELOPE = struct.Struct("<BBQII")
HEADERS, EXTERNAL, RAW = 1, 2, 4
HELLO, WELCOME, READ, LOG, CREDIT, COMMIT, UNREAD, ERROR = 1, 2, 10, 11, 12, 13, 14, 255
SILENCE_MS = 2000
READING = 1


class Reader:
    """One reading of one forwarder."""

    def __init__(self, inbox: str, pattern: str, cursor: str, credit: int) -> None:
        self.pattern, self.cursor, self.credit = pattern, cursor, credit
        self.origin = secrets.randbits(64) or 1
        self.next = 0  # all before this offset has been printed
        self.begun = False
        self.requests = self.read_as = 0
        self.dealer = zmq.Context().socket(zmq.DEALER)
        self.dealer.connect(inbox)

    def ask(self, command: int, **body: object) -> int:
        self.requests += 1
        packed = msgpack.packb(body)
        self.dealer.send(ENVELOPE.pack(command, 1, self.requests, 0, len(packed)) + packed)
        return self.requests

    def hello(self) -> None:
        introduction: dict[str, Any] = {"name": "reader", "bus": "default", "host": "here", "release": "none"}
        self.ask(HELLO, origin=self.origin, epoch=time.time_ns(), inbox=[], pub_port=1, pid=1, **introduction)

    def read(self) -> None:
        body = {"id": READING, "patterns": [self.pattern], "credit": self.credit, "offset": self.next}
        self.read_as = self.ask(READ, **body, **({"cursor": self.cursor} if self.cursor else {}))

    def logged(self, log: dict[str, Any], part: bytes) -> Iterator[str]:
        """What to print for a LOG. Gives credit for it."""
        if not self.begun:
            self.begun = True
            self.next = log["next"]
            yield f"reads from {log['next']}"
        at = 0
        for offset, size, external in log.get("batches", []):
            frame, value = part[at : at + size], part[at + size : at + size + external]
            at += size + external
            yield from self.batch(offset, frame, value)
        assert at == len(part)
        if log.get("dropped"):
            yield f"dropped {log['dropped']}"
        self.next = max(self.next, log["next"])
        if part:
            self.ask(CREDIT, id=READING, bytes=len(part))

    def batch(self, offset: int, frame: bytes, external: bytes) -> Iterator[str]:
        cut = frame.index(0)
        version, kind, flags, count, _, first, _ = HEADER.unpack_from(frame, cut + 1)
        assert (version, kind) == (1, 1)
        payload = external if flags & EXTERNAL else frame[cut + 1 + HEADER.size :]
        values = [payload] if flags & RAW else msgpack.unpackb(payload, strict_map_key=False)
        if flags & HEADERS:
            values, _ = values
        assert len(values) == count
        for place, value in enumerate(values):
            if offset + place >= self.next:
                self.next = offset + place + 1
                yield f"{offset + place} {frame[:cut].decode()} {first + place} {json.dumps(value, default=bytes.hex)}"

    def answers(self) -> Iterator[tuple[int, int, dict[str, Any], bytes]]:
        """What comes from the forwarder; asks whether it is still there when nothing does."""
        while True:
            if not self.dealer.poll(SILENCE_MS):
                self.ask(CREDIT, id=READING, bytes=0)
                continue
            answer = self.dealer.recv()
            command, _, request, number, size = ENVELOPE.unpack_from(answer)
            body = ENVELOPE.size + 4 * number
            part = body + size
            yield command, request, msgpack.unpackb(answer[body:part]), answer[part:]

    def run(self, count: int) -> None:
        self.hello()
        for command, request, body, part in self.answers():
            if command == WELCOME:
                assert body["journal"]
                self.read()
            elif command == LOG and request == self.read_as:
                for line in self.logged(body, part):
                    print(line, flush=True)
                    count -= line[0].isdigit()
                    if not count:
                        break
                if self.cursor and part:
                    self.ask(COMMIT, cursor=self.cursor, offset=self.next, id=READING)
                elif not count:
                    break
            elif command == COMMIT and not count:
                print("committed", body["offset"], flush=True)
                break
            elif command == ERROR and body["code"] == "hello":
                self.hello()
            elif command == ERROR and body["code"] == "reading":
                self.read()
            elif command == ERROR:
                print(body["code"], flush=True)
                break
        self.ask(UNREAD, id=READING)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("inbox")
    parser.add_argument("pattern")
    parser.add_argument("count", type=int)
    parser.add_argument("--cursor", default="")
    parser.add_argument("--credit", type=int, default=1 << 20)
    given = parser.parse_args()
    Reader(given.inbox, given.pattern, given.cursor, given.credit).run(given.count)
