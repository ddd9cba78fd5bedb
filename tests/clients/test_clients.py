"""Clients written from docs/protocol.md alone, against a live node: one in C that listens, one that repairs as well."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from zmq.utils import z85

from zmqbus import BusKey, Node

HERE = Path(__file__).parent
TOPIC = "logs.web1"


def node(**options: Any) -> Node:
    return Node("publisher", interface="127.0.0.1", discovery="static", **options)


def value(seq: int) -> Any:
    """Of every shape that travels differently, in turn."""
    shapes: list[Callable[[], Any]] = [
        lambda: f"line {seq}",
        lambda: {"n": seq, "list": [1, -1, 2**63, 1.5, None, True], "raw": b"\x00\xff"},
        lambda: bytes([seq % 256]) * 20_000,
        lambda: "ä" * 20_000,
        lambda: [[seq]] * 20,
        lambda: {str(n): {"x": n} for n in range(20)},
    ]
    return shapes[seq % len(shapes)]()


def headers(seq: int) -> dict[str, Any] | None:
    return {"seq": seq, "trace": "a" * 50} if seq % 5 == 0 else None


def packed(seq: int) -> str:
    """What the C program prints for `value(seq)`."""
    made = value(seq)
    if isinstance(made, bytes) and len(made) >= 16 * 1024 and headers(seq) is None:
        return f"raw{made.hex()}"
    return msgpack.packb(made).hex()


# --- in C --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def listen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """listen.c, compiled against the system's libzmq."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (Debian: apt-get install gcc libc6-dev)")
    probe = subprocess.run([compiler, "-E", "-"], input="#include <zmq.h>\n", capture_output=True, text=True)
    if probe.returncode:
        pytest.skip("no libzmq for C (Debian: apt-get install libzmq3-dev)")
    program = tmp_path_factory.mktemp("clients") / "listen"
    options = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, "-o", str(program), str(HERE / "listen.c"), "-lzmq"], check=True, timeout=60)
    return program


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    spawned: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(list(map(str, arguments)), text=True, **pipes)  # type: ignore[call-overload]
        spawned.append(process)
        return process

    yield start
    for process in spawned:
        process.kill()
        process.communicate()


def publish_until_it_ends(publisher: Node, process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """Publish slowly and in bursts until the program has what it wants; returns its lines."""
    ended = threading.Event()
    seq = 0

    def publish() -> None:
        nonlocal seq
        while not ended.wait(0.002):
            for _ in range(1 if seq % 100 < 50 else 50):
                seq += 1
                publisher.publish("logs.other", seq)
                publisher.publish(TOPIC, value(seq), headers=headers(seq))

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        out, err = process.communicate(timeout=60)
    finally:
        ended.set()
        thread.join()
    return out.splitlines(), err


def check(lines: list[str], origin: int, count: int) -> None:
    seqs = []
    for line in lines:
        topic, by, seq, shown = line.split(" ", 3)
        if topic == TOPIC:
            assert by == f"{origin:016x}"
            assert shown == packed(int(seq)), f"#{seq}"
            seqs.append(int(seq))
        else:
            assert (topic, shown) == ("logs.other", msgpack.packb(int(seq)).hex())
    assert len(lines) >= count
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    assert {seq % 30 for seq in seqs} == set(range(30))  # each shape, with and without headers


@pytest.mark.parametrize("pattern", [TOPIC, "logs.", ""])
def test_a_c_program_reads_live_messages(listen: Path, spawn: Any, pattern: str) -> None:
    with node() as publisher:
        process = spawn(listen, publisher.endpoints["pub"], pattern, 200)
        lines, complaints = publish_until_it_ends(publisher, process)
        assert complaints == ""
        assert process.returncode == 0
        check(lines, publisher.origin, 200)
        assert (pattern == TOPIC) == all(line.startswith(f"{TOPIC} ") for line in lines)


def derived(key: bytes, info: bytes) -> bytes:
    """HKDF-SHA256, as RFC 5869 has it, for 32 bytes."""
    extracted = hmac.digest(b"zmqbus", key, hashlib.sha256)
    return hmac.digest(extracted, info + b"\1", hashlib.sha256)


def test_a_c_program_with_keys_derived_as_the_page_says(listen: Path, spawn: Any) -> None:
    key = bytes(range(100, 132))
    secret = z85.encode(derived(key, b"curve client"))
    server_public = zmq.curve_public(z85.encode(derived(key, b"curve server")))
    keys = [text.decode() for text in (server_public, zmq.curve_public(secret), secret)]
    with node(key=BusKey(key)) as publisher:
        process = spawn(listen, publisher.endpoints["pub"], TOPIC, 200, *keys)
        lines, complaints = publish_until_it_ends(publisher, process)
        assert complaints == ""
        check(lines, publisher.origin, 200)


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"\0"],
        [b"logs\0"],
        [b"logs\0" + bytes(32)],
        [b"logs\0\1\1\0\0\xff\xff\xff\xff" + bytes([1] * 24) + b"\xdd\xff\xff\xff\xff"],
        [b"logs\0\1\1\0\0\1\0\0\0" + bytes([1] * 24)],
        [b"logs\0\1\1\0\0\1\0\0\0" + bytes([1] * 24) + b"\x91\xdb\xff\xff\xff\xff"],
        [b"logs\0\1\1\0\0\1\0\0\0" + bytes([1] * 24) + b"\x91\xdf\xff\xff\xff\xff\xff"],
        [b"logs\0\1\1\1\0\1\0\0\0" + bytes([1] * 24) + b"\x91\xc0"],
        [b"logs\0\1\1\2\0\1\0\0\0" + bytes([1] * 24)],
        [b"logs\0\1\1\2\0\1\0\0\0" + bytes([1] * 24), b"\x92\xc0"],
        [b"logs\0\1\1\2\0\1\0\0\0" + bytes([1] * 24), b"\x91\xc0", b"more"],
        [b"logs\0\1\1\x08\0\1\0\0\0" + bytes([1] * 24) + b"\x91\xc0"],
        [b"x" * 256 + b"\0\1\1\0\0\1\0\0\0" + bytes([1] * 24) + b"\x91\xc0"],
    ],
    ids=range(14),
)
def test_the_c_program_survives_what_breaks_the_protocol(listen: Path, spawn: Any, parts: list[bytes]) -> None:
    """It is an example for others, so it must be a good one."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.linger = 5000
        socket.rcvtimeo = 20_000
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        process = spawn(listen, f"tcp://127.0.0.1:{port}", "", 1)
        assert socket.recv() == b"\1"
        socket.send_multipart(parts)
        socket.send(b"a\0\1\1\0\0\1\0\0\0" + bytes([1] * 24) + b"\x91\xc0")
        out, complaints = process.communicate(timeout=30)
        assert out.splitlines() == [f"a {'01' * 8} {0x0101010101010101} c0"]
        assert complaints == "something that breaks the protocol\n"


# --- with pyzmq and msgpack --------------------------------------------------------------------


@pytest.mark.parametrize("lose", [0, 2, 3])
def test_a_guest_repairs_what_it_loses(spawn: Any, lose: int) -> None:
    count = 300
    with node() as publisher:
        for seq in range(1, 4):
            publisher.publish(TOPIC, value(seq))  # before its time: not owed
        guest = spawn(sys.executable, HERE / "guest.py", publisher.endpoints["inbox"], TOPIC, count, "--lose", lose)
        assert guest.stdout.readline() == "ready\n", guest.stderr.read()
        for seq in range(4, 4 + count):
            publisher.publish(TOPIC, value(seq), headers=headers(seq))
        out, complaints = guest.communicate(timeout=60)
        assert complaints == ""
        *lines, last = out.splitlines()
        assert [int(line.split(" ", 1)[0]) for line in lines] == list(range(4, 4 + count))
        for line in lines:
            seq, shown = line.split(" ", 1)
            assert shown == json.dumps(value(int(seq)), default=bytes.hex)
        assert last.startswith("fetched ")
        if lose:
            assert int(last.split()[1]) >= count // 256  # at least the frames that held them


class Asker:
    """A bare DEALER, to ask what a well-behaved client does not."""

    def __init__(self, inbox: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 20_000
        self.socket.connect(inbox)

    def ask(self, command: int, body: Any, *, version: int = 1, request: int = 77) -> tuple[int, int, Any]:
        """(command, request, body) of the answer."""
        packed = body if isinstance(body, bytes) else msgpack.packb(body)
        self.socket.send(struct.pack("<BBQII", command, version, request, 0, len(packed)) + packed)
        return self.answer()

    def answer(self) -> tuple[int, int, Any]:
        answer = self.socket.recv()
        command, version, request, number, size = struct.unpack_from("<BBQII", answer)
        assert version == 1
        begin = 18 + 4 * number
        return command, request, msgpack.unpackb(answer[begin : begin + size])

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()


HELLO: dict[str, Any] = {
    "origin": 5,
    "name": "asker",
    "bus": "default",
    "epoch": 1,
    "inbox": [],
    "pub_port": 1,
    "host": "h",
    "pid": 1,
    "release": "r",
}


def test_errors_are_as_the_page_says() -> None:
    with node() as publisher, Asker(publisher.endpoints["inbox"]) as asker:
        command, request, body = asker.ask(3, {})
        assert (command, request, body["code"]) == (255, 77, "hello")
        assert asker.ask(1, HELLO | {"bus": "other"})[2]["code"] == "bus"
        assert asker.ask(1, HELLO | {"version_min": 2, "version_max": 9}, version=9)[2]["code"] == "version"
        command, request, body = asker.ask(1, HELLO | {"version_max": 9, "later": 1}, version=9)
        assert (command, request, body["origin"]) == (2, 77, publisher.origin)
        assert asker.ask(200, {})[2]["code"] == "unknown"
        assert asker.ask(200, b"\xc1", request=2**64 - 1)[1] == 2**64 - 1
        command, request, body = asker.ask(7, {"topic": b"a"})
        assert (command, request, body["code"]) == (255, 0, "protocol")
        assert asker.ask(24, {}, version=2)[2]["code"] == "protocol"
        assert asker.ask(8, {"topic": b"a", "origin": 1, "first": 1, "last": 1})[2]["code"] == "unexpected"
        wrong_origin = {"topic": b"a", "origin": 1, "first": 1, "last": 1}
        assert asker.ask(7, wrong_origin)[2]["code"] == "origin"
        command, _, body = asker.ask(7, wrong_origin | {"origin": publisher.origin})
        assert (command, body["last"]) == (8, 1)


def test_a_hello_with_subscriptions_is_answered_by_heads() -> None:
    with node() as publisher, Asker(publisher.endpoints["inbox"]) as asker:
        publisher.publish("a.b", 1)
        publisher.publish("a.c", 1)
        publisher.publish("a.c", 2)
        wanted = [{"id": 1, "patterns": ["a.*"]}, {"id": 9, "patterns": ["x"]}]
        assert asker.ask(1, HELLO | {"subscriptions": wanted})[:2] == (2, 77)
        command, request, body = asker.answer()
        assert (command, request) == (6, 77)
        assert (body["id"], sorted(body["heads"])) == (1, [[b"a.b", 2], [b"a.c", 3]])
        assert asker.answer() == (6, 77, {"id": 9, "heads": []})
        publisher.publish("a.d", 1)
        command, _, body = asker.ask(4, {"id": 1, "patterns": ["a.*"]})  # again: first what was said, then what is
        assert (command, body["more"], sorted(body["heads"])) == (6, True, [[b"a.b", 2], [b"a.c", 3], [b"a.d", 1]])
        command, _, body = asker.answer()
        assert (body.get("more", False), sorted(body["heads"])) == (False, [[b"a.b", 2], [b"a.c", 3], [b"a.d", 2]])


def test_statistics_can_be_asked_for_by_anyone() -> None:
    with node() as publisher, Asker(publisher.endpoints["inbox"]) as asker:
        publisher.publish("a", "x")
        assert asker.ask(1, HELLO)[0] == 2
        command, _, body = asker.ask(24, {"topics": True})
        assert command == 25
        assert body["counters"]["messages_published"] == 1
        ((topic, last, size),) = body["topics"]
        assert (topic, last) == (b"a", 1)
        assert size > 0
