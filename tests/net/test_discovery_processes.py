"""Discovery between processes: on loopback, and on hosts of a LAN whose links and addresses change."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from tests.netns import Host, Lan

PATIENCE_S = 60.0  # a bound on waiting; what is waited for takes milliseconds, or at most two seconds
LOOPBACK = ("127.0.0.1",)


@pytest.fixture
def bus() -> str:
    """A name of its own for each test: others may run on this machine's loopback at the same time."""
    return f"test-{uuid.uuid4().hex}"


NODE = """
import asyncio, json, sys
from zmqbus.net.discovery import Discovery

def say(event, **facts):
    print(json.dumps({"event": event} | facts), flush=True)

async def main(bus, origin, addresses):
    node = Discovery(
        bus=bus, origin=origin, inbox_port=10_000 + origin, pub_port=20_000 + origin, epoch=30_000 + origin,
        addresses=addresses,
        on_found=lambda found: say("found", origin=found.origin, found=found),
        on_gone=lambda origin: say("gone", origin=origin),
        on_warning=lambda text: say("warning", text=text),
    )
    await node.start()
    say("started")
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while command := (await commands.readline()).decode().split():
        if command[0] == "refresh":
            await node.refresh()
        elif command[0] == "addresses":
            await node.set_addresses(command[1:])
        elif command[0] == "close":
            await node.close()
        say("done")

asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
"""


class Child:
    """A node in a process of its own, on this machine's loopback or on a host of a Lan."""

    def __init__(self, bus: str, origin: int, addresses: Sequence[str] = LOOPBACK, host: Host | None = None) -> None:
        argv = [sys.executable, "-c", NODE, bus, str(origin), *addresses]
        start = subprocess.Popen if host is None else host.popen
        self._process: subprocess.Popen[str] = start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))

    def expect(self, **facts: Any) -> dict[str, Any]:
        """The next event with these facts; what comes before it is dropped."""
        while True:
            event = self._events.get(timeout=PATIENCE_S)
            if facts.items() <= event.items():
                return event

    def tell(self, *command: str) -> None:
        """Have a command executed, to its end."""
        assert self._process.stdin is not None
        print(*command, file=self._process.stdin, flush=True)

    def drain(self) -> list[dict[str, Any]]:
        """All events up to now."""
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def test_two_processes_find_each_other(bus: str) -> None:
    with Child(bus, 1) as one:
        one.expect(event="started")
        with Child(bus, 2) as two:
            found = one.expect(event="found", origin=2)
            assert found["found"] == [2, ["127.0.0.1"], 10_002, 20_002, 30_002, 1]
            # A unicast answer may go to any process on this host; two has its answer when it asks by multicast.
            two.expect(event="found", origin=1)
            two.tell("close")
            one.expect(event="gone", origin=2)


# --- a LAN ---------------------------------------------------------------------------------------


@pytest.mark.netns
def test_two_hosts_find_each_other_and_again_after_the_link_was_down(bus: str) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        with Child(bus, 1, [a.address], a) as one, Child(bus, 2, [b.address], b) as two:
            assert one.expect(event="found", origin=2)["found"] == [2, [b.address], 10_002, 20_002, 30_002, 1]
            two.expect(event="found", origin=1)

            b.link_down()
            two.tell("refresh")  # nobody hears it
            two.expect(event="done")
            b.link_up()
            one.drain()
            two.drain()
            two.tell("refresh")
            one.expect(event="found", origin=2)
            two.expect(event="found", origin=1)


@pytest.mark.netns
def test_nodes_that_started_apart_meet_after_the_partition(bus: str) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        a.block(b)
        with Child(bus, 1, [a.address], a) as one, Child(bus, 2, [b.address], b) as two:
            one.expect(event="started")
            two.expect(event="started")
            a.unblock(b)
            one.tell("refresh")
            two.expect(event="found", origin=1)
            one.expect(event="found", origin=2)


@pytest.mark.netns
def test_a_new_address_replaces_the_old(bus: str) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        with Child(bus, 1, [a.address], a) as one, Child(bus, 2, [b.address], b) as two:
            one.expect(event="found", origin=2)
            two.expect(event="found", origin=1)
            old = b.address
            two.tell("addresses")  # none while DHCP thinks
            two.expect(event="done")
            b.set_address(old, "10.77.0.99")
            two.tell("addresses", b.address)
            two.expect(event="found", origin=1)
            # What was heard less than a second ago is kept beside the new, until the last packet of the announcement.
            while one.expect(event="found", origin=2)["found"][1] != ["10.77.0.99"]:
                pass
            assert [event for event in one.drain() if event["event"] == "gone"] == []


@pytest.mark.netns
def test_several_addresses_are_all_announced(bus: str) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        second, third = "10.77.0.200", "10.99.0.1"
        b.run(["ip", "address", "add", f"{second}/24", "dev", "eth0"])  # on the same interface
        b.run(["ip", "link", "add", "inner0", "type", "veth", "peer", "name", "inner1"])  # and one that leads nowhere
        b.run(["ip", "address", "add", f"{third}/24", "dev", "inner0"])
        b.run(["ip", "link", "set", "inner0", "up"])
        with Child(bus, 1, [a.address], a) as one, Child(bus, 2, [b.address, second, third], b) as two:
            assert one.expect(event="found", origin=2)["found"][1] == [b.address, second, third]
            events = [two.expect(), two.expect()]
            assert sorted(event["event"] for event in events) == ["found", "started"]  # and no warning


@pytest.mark.netns
def test_closing_without_a_network_ends(bus: str) -> None:
    with Lan(hosts=1) as lan:
        (a,) = lan.hosts
        with Child(bus, 1, [a.address], a) as one:
            one.expect(event="started")
            a.link_down()
            one.tell("refresh")
            one.expect(event="done")
            one.tell("close")
            one.expect(event="done")


# Asks every way for our service type and prints how many answered before its standard input says "enough".
ASKER = """
import socket, struct, sys
source, *targets = sys.argv[1:]
question = struct.pack("!6H", 7, 0, 1, 0, 0, 0) + b"\\7_zmqbus\\4_tcp\\5local\\0" + struct.pack("!2H", 12, 1)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((source, 0))
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(source))
for target in targets:
    s.sendto(question, (target, 5353))
print("asked", flush=True)
if sys.stdin.readline().strip() == "wait":
    s.settimeout(20)
else:
    s.setblocking(False)
try:
    print("answered by", s.recvfrom(9000)[1][0])
except BlockingIOError:
    print("silence")
"""

# Stands in for avahi: joins the group on the wire, so that the kernel offers its packets to sockets on 0.0.0.0:5353.
BYSTANDER = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.bind(("224.0.0.251", 5353))
group = socket.inet_aton("224.0.0.251") + socket.inet_aton(sys.argv[1])
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
print("joined", flush=True)
while True:
    print("heard", s.recvfrom(9000)[1][0], flush=True)
"""


@pytest.mark.netns
@pytest.mark.parametrize("confined", [True, False])
def test_a_node_on_loopback_answers_nobody_outside(bus: str, confined: bool) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        bystander: Any = a.popen([sys.executable, "-c", BYSTANDER, a.address], **pipes)
        assert bystander.stdout.readline() == "joined\n"
        with Child(bus, 1, LOOPBACK if confined else [a.address], a) as node:
            node.expect(event="started")
            asker: Any = b.popen([sys.executable, "-c", ASKER, b.address, "224.0.0.251", a.address], **pipes)
            assert asker.stdout.readline() == "asked\n"
            while bystander.stdout.readline() != f"heard {b.address}\n":
                pass
            if confined:
                # By the time it has answered this, it is through with whatever came before.
                near = a.popen([sys.executable, "-c", ASKER, "127.0.0.1", "224.0.0.251"], **pipes)
                assert near.communicate("wait\n", timeout=PATIENCE_S)[0] == "asked\nanswered by 127.0.0.1\n"
                assert asker.communicate("enough\n", timeout=PATIENCE_S)[0] == "silence\n"
            else:
                assert asker.communicate("wait\n", timeout=PATIENCE_S)[0] == f"answered by {a.address}\n"


@pytest.mark.netns
def test_a_node_on_loopback_sends_nothing_outside(bus: str) -> None:
    with Lan(hosts=1) as lan:
        (a,) = lan.hosts
        with Child(bus, 1, LOOPBACK, a) as one, Child(bus, 2, LOOPBACK, a) as two:
            one.expect(event="found", origin=2)
            two.tell("refresh")
            one.expect(event="found", origin=2)
            two.tell("close")
            one.expect(event="gone", origin=2)
        assert a.sent_packets() == 0
        with Child(bus, 3, [a.address], a) as three:  # so much for the counter
            three.expect(event="started")
            three.tell("close")
            three.expect(event="done")
        assert a.sent_packets() > 0
