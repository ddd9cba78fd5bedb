"""A subscription's connections, when one is closed at a bad moment."""

from __future__ import annotations

import subprocess
import sys

# Two publishers send messages of two parts. Somebody has looked whether there is something to receive, and then the
# connection that the next message is of is closed.
CLOSED_BEFORE_THE_SECOND_PART = """
import asyncio, time, zmq
from zmqbus.net.sockets import EVENTS, NOBLOCK, Again, SocketFactory
from zmqbus.node.receiving.feed import Feed, Gate

async def main():
    context = zmq.Context()
    pubs = [context.socket(zmq.PUB) for _ in range(2)]
    endpoints = [f"tcp://127.0.0.1:{pub.bind_to_random_port('tcp://127.0.0.1')}" for pub in pubs]
    factory = SocketFactory(None)
    socket = factory.sub(64)
    socket.subscribe(b"")
    attached = asyncio.Event()
    feed = Feed(factory, asyncio.get_running_loop(), socket, Gate(lambda: None), attached.set)
    rescued = []
    feed.rescue = rescued.append
    for endpoint in endpoints:
        feed.connect(endpoint)
    while len(feed.attached) < 2:
        attached.clear()
        await asyncio.wait_for(attached.wait(), 10)
    def send():
        for pub, name in zip(pubs, (b"a", b"b")):
            pub.send_multipart([name, b"x"])
    while not int(socket.get(EVENTS)) & zmq.POLLIN:  # the first may be sent before the subscriptions are there
        send()
        await asyncio.sleep(0.01)
    for _ in range(20):
        send()
    await asyncio.sleep(0.1)
    for endpoint in endpoints:
        feed.disconnect(endpoint)
        try:
            while True:
                socket.recv_multipart(NOBLOCK)
        except Again:
            pass
    assert len(rescued) >= 1 and all(len(parts) == 2 for parts in rescued), rescued
    with feed.gate.visit():
        feed.close()
    for pub in pubs:
        pub.close(0)
    context.term()
    factory.close()
    print("alive")

asyncio.run(main())
"""


def test_a_connection_may_be_closed_while_libzmq_holds_half_a_message_of_it() -> None:
    program = [sys.executable, "-c", CLOSED_BEFORE_THE_SECOND_PART]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")
