"""`zmqbus nodes`, `topics`, `keygen` and `completion`: who is there, what they publish, and how to begin."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.forms import human_age, human_bytes, moment, rfc3339
from zmqbus.cli.shell import Bus, Column, Duration, Watch, plural, remark
from zmqbus.net.clock import now, sleep, time_ns
from zmqbus.protocol.topics import check_pattern

if TYPE_CHECKING:
    from zmqbus.node.node import Node
    from zmqbus.protocol.peers import Peer

SETTLE = "1.5s"  # nodes on one machine or LAN have found each other well within this
REDRAW = 0.5


def _wait(node: Node, watch: Watch, seconds: float) -> None:
    """Let discovery settle, passing on what it warns of."""
    until = now() + seconds
    while (rest := until - now()) > 0:
        sleep(min(rest, shell.PEEK))
        watch.poll()


# --- nodes -------------------------------------------------------------------------------------

_COLUMNS: tuple[Column, ...] = (
    ("name", False),
    ("origin", False),
    ("host", False),
    ("pid", True),
    ("role", False),
    ("inbox", False),
    ("release", False),
    ("age", True),
)


def _cells(peer: Peer) -> list[str]:
    from zmqbus.cli.render import escape

    age = human_age(time_ns() / 1e9 - peer.epoch / 1e9) if peer.epoch else ""
    texts = map(
        escape, (peer.name, f"{peer.origin:016x}", peer.host, str(peer.pid), peer.role, peer.inbox, peer.version)
    )
    return [*texts, age]


def _row(peer: Peer) -> dict[str, Any]:
    return {
        "name": peer.name,
        "origin": f"{peer.origin:016x}",
        "host": peer.host,
        "pid": peer.pid,
        "role": peer.role,
        "inbox": peer.inbox,
        "pub": peer.pub,
        "claims": list(peer.claims),
        "release": peer.version,
        "started": rfc3339(moment(peer.epoch / 1e9)),
    }


def _by_name(peers: Sequence[Peer]) -> list[Peer]:
    return sorted(peers, key=lambda peer: (peer.name, peer.origin))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--watch", "watching", is_flag=True, help="Go on: a live table, or a line for each who comes and goes.")
@click.option("--wait", type=Duration(), default=SETTLE, show_default=True, help="How long to look for nodes first.")
@click.pass_obj
def nodes(bus: Bus, as_json: bool, watching: bool, wait: float) -> None:
    """List the nodes of the bus.

    `age` is the time since a node was started.
    """
    with bus.join("nodes") as node:
        watch = Watch(node)
        if watching:
            _watch_nodes(node, watch, as_json)
            return
        _wait(node, watch, wait)
        peers = _by_name(node.peers())
        if as_json:
            for peer in peers:
                click.echo(msgspec.json.encode(_row(peer)))
        elif peers:
            shell.show_table(_COLUMNS, [_cells(peer) for peer in peers])
        if not peers:
            remark(f"no other node is on bus {bus.name!r}")


def _watch_nodes(node: Node, watch: Watch, as_json: bool) -> None:
    if not as_json and shell.on_terminal():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            while True:
                watch.poll()
                live.update(shell.make_table(_COLUMNS, [_cells(peer) for peer in _by_name(node.peers())]), refresh=True)
                sleep(REDRAW)
    present: dict[int, Peer] = {}
    while True:
        watch.poll()
        peers = {peer.origin: peer for peer in node.peers()}
        for event, changed in (
            ("left", [present[origin] for origin in present.keys() - peers.keys()]),
            ("joined", [peers[origin] for origin in peers.keys() - present.keys()]),
        ):
            for peer in _by_name(changed):
                if as_json:
                    click.echo(msgspec.json.encode({"event": event, **_row(peer)}))
                else:
                    click.echo(f"{event:6}  {'  '.join(_cells(peer)[:-1])}")
        present = peers
        sleep(shell.PEEK)


# --- topics ------------------------------------------------------------------------------------


@click.command()
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--wait", type=Duration(), default=SETTLE, show_default=True, help="How long to look for nodes first.")
@click.option("--timeout", type=Duration(), default="2s", show_default=True, help="How long each node has to answer.")
@click.pass_obj
def topics(bus: Bus, patterns: tuple[str, ...], as_json: bool, wait: float, timeout: float) -> None:
    """List what has been published on the bus.

    Each node is asked for its streams: topic, seq of the last message, and bytes sent so far.
    """
    for pattern in patterns:
        check_pattern(pattern)
    with bus.join("topics") as node:
        watch = Watch(node)
        _wait(node, watch, wait)
        found = node.topics(*patterns, timeout=timeout)
        watch.poll()
        if as_json:
            for info in found:
                row = msgspec.structs.asdict(info) | {"origin": f"{info.origin:016x}"}
                click.echo(msgspec.json.encode(row))
        elif found:
            from zmqbus.cli.render import escape

            columns: tuple[Column, ...] = (("topic", False), ("node", False), ("last seq", True), ("bytes", True))
            rows = [[escape(i.topic), escape(i.node), f"{i.seq:,}", human_bytes(i.bytes)] for i in found]
            shell.show_table(columns, rows)
        if not found:
            others = len(node.peers())
            asked = f"none of the {plural(others, 'node')}" if others else "no other node"
            remark(f"{asked} on bus {bus.name!r} {'has published on such a topic' if others else 'is there'}")


# --- keygen ------------------------------------------------------------------------------------


@click.command()
@click.argument("file", type=click.Path())
def keygen(file: str) -> None:
    """Create a bus key in FILE, readable by you alone. Whoever has a copy of it is a member of the bus."""
    from zmqbus.net.keys import BusKey

    key = BusKey.generate()
    key.save(file)
    path = shlex.quote(str(Path(file).absolute()))
    click.echo(f"bus key {key.fingerprint} written to {file}")
    click.echo()
    click.echo("Copy the file to every machine of the bus, over a safe channel, keeping it private:")
    click.echo(f"  scp -p {path} HOST:")
    click.echo("Then use it everywhere:")
    click.echo(f"  zmqbus --key-file {path} nodes")
    click.echo(f"  export ZMQBUS_KEY_FILE={path}")
    click.echo('  zmqbus.Node(key="FILE")    # in Python')


# --- completion --------------------------------------------------------------------------------


@click.command()
@click.argument("shell_name", metavar="[bash|zsh|fish]", type=click.Choice(["bash", "zsh", "fish"]), required=False)
@click.pass_context
def completion(context: click.Context, shell_name: str | None) -> None:
    """Print a completion script for your shell.

    It completes commands and options of zmqbus. Default: the shell that $SHELL names.

    \b
    bash:  eval "$(zmqbus completion bash)"                        in ~/.bashrc
    zsh:   eval "$(zmqbus completion zsh)"                         in ~/.zshrc
    fish:  zmqbus completion fish | source                         in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    name = shell_name or os.path.basename(os.environ.get("SHELL", ""))
    kind = get_completion_class(name)
    if kind is None:
        raise click.UsageError("say which shell: bash, zsh or fish")
    click.echo(kind(context.find_root().command, {}, "zmqbus", "_ZMQBUS_COMPLETE").source())
