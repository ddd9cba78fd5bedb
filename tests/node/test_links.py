"""A peer that dies while what it said is read: libzmq must not take this process with it."""

from __future__ import annotations

import asyncio
import multiprocessing
import time

import zmq

from zmqbus.net.sockets import SocketFactory
from zmqbus.node.wiring.links import Link
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Command, encode_command

ANSWERS = 60  # of three parts: the 101st, at which libzmq looks what became of its connections, is a second one


async def read_what_a_dead_peer_said() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    factory = SocketFactory(None)
    heard: list[Command] = []

    def hear(link: Link, command: Command) -> None:
        if not heard:  # the others are here as well
            router.close(0)
            context.term()
            time.sleep(0.3)
        heard.append(command)

    said: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def hello(link: Link) -> bool:
        if link.send(commands.Bye()):
            said.set_result(None)
        return said.done()

    link = Link(
        factory,
        asyncio.get_running_loop(),
        f"tcp://127.0.0.1:{port}",
        hear,
        lambda error: None,
        hello,
        None,
    )
    await said
    identity = router.recv_multipart()[0]
    for _ in range(ANSWERS):
        router.send_multipart([identity, *encode_command(commands.Batches(b"a", 1, 1, 1), 0, [b"x"])])
    time.sleep(0.3)
    while not heard:
        await asyncio.sleep(0.01)
    link.close()
    factory.close()


def in_a_process() -> None:
    asyncio.run(read_what_a_dead_peer_said())


def test_a_peer_may_die_while_what_it_said_is_read() -> None:
    process = multiprocessing.get_context("spawn").Process(target=in_a_process)
    process.start()
    process.join(30)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0
