"""`topics()`: what everybody has published, asked of everybody. And the package's face, which is loaded when used."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import zmqbus
from zmqbus.node.peers.links import Link
from zmqbus.node.peers.serving import TOPICS_PER_STATS


def test_streams_of_all_nodes_are_listed(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    many = 2 * TOPICS_PER_STATS + 1  # several pages
    for i in range(many):
        a.publish(f"many.{i:05}", i)
    for value in ("x", "y", "z"):
        b.publish("few", value)
    assert [(info.topic, info.node, info.seq) for info in a.topics("few")] == [("few", "b", 3)]
    found = b.topics()
    assert [info.topic for info in found] == ["few", *(f"many.{i:05}" for i in range(many))]
    assert {info.origin for info in found} == {a.origin, b.origin}
    assert found[0].bytes > 3 * len("few")
    assert [info.topic for info in b.topics("many.00007", "nothing.*")] == ["many.00007"]
    with pytest.raises(zmqbus.TopicError):
        b.topics("a..b")


def test_who_does_not_answer_is_named(pair: tuple[zmqbus.Node, zmqbus.Node], monkeypatch: pytest.MonkeyPatch) -> None:
    async def silence(link: Link, body: object, timeout: float) -> None:
        return None

    monkeypatch.setattr(Link, "question", silence)
    a, _ = pair
    a.publish("own", 1)
    with a.events() as events:
        assert [info.topic for info in a.topics(timeout=0.5)] == ["own"]
        assert events.get(5) == zmqbus.Warned("b did not say within 0.5 s what it publishes")


def test_the_asyncio_face_has_it_too(bus: str) -> None:
    async def main() -> list[zmqbus.TopicInfo]:
        async with zmqbus.AsyncNode("a", bus=bus) as a, zmqbus.AsyncNode("b", bus=bus) as b:
            await b.wait_for_peers(1, timeout=10)
            await a.publish("t", 1)
            await a.flush()
            return await b.topics("t")

    [info] = asyncio.run(main())
    assert (info.topic, info.node, info.seq) == ("t", "a", 1)


def test_the_face_is_the_same_for_people_and_type_checkers() -> None:
    path = Path(zmqbus.__file__)
    checked = {
        alias.name: f"{statement.module}"
        for block in ast.parse(path.read_text()).body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert checked == {name: f"zmqbus.{home}" for name, home in zmqbus._HOMES.items()}
    assert sorted(zmqbus.__all__) == sorted([*checked, "__version__"])
    assert set(zmqbus.__all__) <= set(dir(zmqbus))
    for name in zmqbus.__all__:
        assert getattr(zmqbus, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nodes'"):
        zmqbus.Nodes  # noqa: B018


def test_importing_the_package_imports_neither_sockets_nor_mdns() -> None:
    program = "import sys, zmqbus; print({'zmq', 'zeroconf', 'asyncio', 'msgspec'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"
