"""On a terminal: tables, colours, live pictures, and that the terminal is left as it was."""

from __future__ import annotations

import pytest

import zmqbus
from tests.cli.commands import PATIENCE, Terminal, plain

SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"


def test_tap_shows_a_live_table(bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node, Terminal("tap", "--subjects") as tap:
        node.wait_for_subscribers("live.topic", 1, PATIENCE)
        tap.until("live.topic", lambda: node.publish("live.topic", "x"))
        tap.interrupt()
        code, shown = tap.end()
    assert code == 130
    assert "> on bus '" in shown
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    assert "counted in 1 topic; nothing lost" in shown


def test_tap_shows_the_last_message_of_each_topic(bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node, Terminal("tap", "--last-per-topic", columns=80) as tap:
        node.wait_for_subscribers("t.a", 1, PATIENCE)
        for i in range(5):
            node.publish("t.a", f"first {i}")
            node.publish("t.b", {"status": i, "path": "/" + "x" * 60})
        tap.until("first 4")
        tap.until('{"status":4')  # while it is live, each keeps to one line
        tap.interrupt()
        code, shown = tap.end()
    assert code == 130
    final = plain(shown[shown.rindex(SHOW) :])
    assert "t.a" in final
    assert '    status: 4\n    path: "/xxx' in final
    assert final.endswith("zmqbus: 10 messages seen, 10 matched, 2 shown: the last of each topic; nothing lost\n")


def test_tap_spreads_maps_out_in_colour(bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node, Terminal("tap", "-n", "1", columns=120) as tap:
        node.wait_for_subscribers("t", 1, PATIENCE)
        node.publish("t", {"status": 500, "path": "/"}, headers={"trace": "7f3a"})
        code, shown = tap.end()
    assert code == 0
    assert "\x1b[33m  status: \x1b[0m500" in shown
    assert '[trace=7f3a]  status: 500  path: "/"\n' in plain(shown)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_nodes_never_folds_an_endpoint(columns: int, bus: str) -> None:
    with (
        zmqbus.Node("a-node-with-quite-a-long-name", bus=bus) as node,
        Terminal("nodes", "--wait", "500ms", columns=columns) as nodes,
    ):
        code, shown = nodes.end()
    assert code == 0
    assert node.endpoints["inbox"] in plain(shown)
    assert columns < 80 or f"{node.origin:016x}" in plain(shown)
    assert columns < 200 or "release" in plain(shown)
    assert "\x1b[1m" in shown


def test_sub_is_coloured_unless_asked_not_to(bus: str) -> None:
    with zmqbus.Node("keeper", bus=bus) as node:
        node.publish("t", "hi")
        with Terminal("sub", "t", "--history", "1", "-n", "1", NO_COLOR="") as sub:
            assert "\x1b[36mt\x1b[0m  hi" in sub.end()[1]


@pytest.mark.parametrize(
    "args",
    [
        ("sub", "t", "--history", "1", "-n", "1"),
        ("tap", "t", "--for", "300ms"),
        ("nodes", "--wait", "300ms"),
        ("topics", "--wait", "300ms"),
    ],
    ids=lambda args: args[0],
)
def test_no_color_is_respected_everywhere(args: tuple[str, ...], bus: str) -> None:
    with zmqbus.Node("keeper", bus=bus) as node:
        node.publish("t", "hi")
        with Terminal(*args, NO_COLOR="1") as command:
            code, shown = command.end()
    assert code == 0
    assert "\x1b" not in shown
