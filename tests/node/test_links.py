"""The way to a peer's inbox: used by many threads, and when the peer dies."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from zmqbus.net.sockets import SocketFactory
from zmqbus.node.peers.links import Inbox, Link
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Command

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
        router.send_multipart([identity, encode_command(commands.Batches(b"a", 1, 1, 1), 0, [b"x"] * 30)])
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


THREADS, EACH = 4, 2000


def test_many_threads_say_and_answer_while_the_loop_reads() -> None:
    """Nothing is mixed up, and what comes in while they do is met, although their use of a socket takes its signals."""
    heard: Counter[int] = Counter()
    answers: Counter[int] = Counter()
    identity: list[bytes] = []
    done = threading.Event()

    def all_there() -> None:
        if heard.total() == answers.total() == THREADS * EACH:
            done.set()

    def on_command(whose: bytes, command: Command) -> None:
        if isinstance(command.body, commands.Bye):
            identity.append(whose)
        else:
            assert isinstance(command.body, commands.Done)
            assert [command.body.id] * 3 == [credit for _, _, credit in command.body.done]
            heard[command.body.id] += 1
            all_there()

    def on_answer(command: Command | None) -> None:
        if command is None:  # it is closed
            return
        assert isinstance(command.body, commands.Job)
        assert command.batches == [b"%d" % command.body.id] * 5
        answers[command.body.id] += 1
        all_there()

    def say(link: Link, number: int, thread: int) -> None:
        for turn in range(EACH):
            what = thread * EACH + turn + 1
            while not link.say(commands.Done(what, [(1, 1, what)] * 3), number):
                time.sleep(0.0005)  # it has too much to send

    def answer(inbox: Inbox, request: int, thread: int) -> None:
        for turn in range(EACH):
            what = thread * EACH + turn + 1
            while not inbox.answer(identity[0], commands.Job(what, []), request, [b"%d" % what] * 5):
                time.sleep(0.0005)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        theirs, ours = SocketFactory(None), SocketFactory(None)
        router = theirs.router()
        endpoint = theirs.bind(router, "127.0.0.1")
        inbox = Inbox(router, loop, on_command, print)
        link = Link(
            ours, loop, endpoint, lambda link, command: None, print, lambda link: link.send(commands.Bye()), None
        )
        async with asyncio.timeout(60):
            while not identity:
                await asyncio.sleep(0.001)
            number = link.follow(commands.Done(THREADS * EACH + 1, [(1, 1, THREADS * EACH + 1)] * 3), on_answer)
            while not heard:
                await asyncio.sleep(0.001)
            heard.clear()
            with ThreadPoolExecutor(2 * THREADS) as threads:
                for thread in range(THREADS):
                    threads.submit(say, link, number, thread)
                    threads.submit(answer, inbox, number, thread)
                await loop.run_in_executor(None, done.wait, 50)
        link.close()
        inbox.close(0)
        ours.close()
        theirs.close()

    asyncio.run(main())
    assert set(heard.values()) == set(answers.values()) == {1}
    assert len(heard) == len(answers) == THREADS * EACH
