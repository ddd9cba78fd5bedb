"""The way to a peer's inbox, when the peer dies."""

from __future__ import annotations

import subprocess
import sys

# A peer answers with many messages of many parts, and is killed while this process is busy with something else.
BUSY_WHILE_THE_PEER_DIES = """
import asyncio, os, signal, time, zmq
from zmqbus.net.sockets import SocketFactory
from zmqbus.node.peers.links import Link
from zmqbus.protocol import commands
from zmqbus.protocol.commands import encode_command

ours, theirs = os.pipe()
peer = os.fork()
if peer == 0:
    router = zmq.Context().socket(zmq.ROUTER)
    os.write(theirs, b"%05d" % router.bind_to_random_port("tcp://127.0.0.1"))
    identity, *_ = router.recv_multipart()
    for _ in range(60):
        router.send_multipart([identity, *encode_command(commands.Batches(b"a", 1, 1, 1), 0, [b"x"] * 30)])
    time.sleep(100)
port = int(os.read(ours, 5))
received = 0

async def main():
    global received
    loop = asyncio.get_running_loop()
    came = asyncio.Event()

    def on_command(link, command):
        global received
        received += 1
        if received == 1:
            os.kill(peer, signal.SIGKILL)
            os.waitpid(peer, 0)
            time.sleep(0.3)  # the answers have come, and that the connection has broken is known, but not to us
            came.set()

    def hello(link):
        return link.send(commands.Bye())

    factory = SocketFactory(None)
    link = Link(factory, loop, f"tcp://127.0.0.1:{port}", on_command, print, hello, None)
    await asyncio.wait_for(came.wait(), 10)
    await asyncio.sleep(0.3)
    link.close()
    factory.close()

asyncio.run(main())
print("alive,", received)
"""


def test_a_peer_that_dies_while_its_answers_are_read_takes_nobody_with_it() -> None:
    """libzmq aborts a process that learns in the midst of a message that the connection is gone."""
    done = subprocess.run([sys.executable, "-c", BUSY_WHILE_THE_PEER_DIES], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("alive, ")
