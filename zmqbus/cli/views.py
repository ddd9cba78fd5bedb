"""`zmqbus nodes`, `topics`, `keygen` and `completion`: who is there, what they publish, and how to begin."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from zmqbus.cli.messages.forms import human_age, human_bytes, moment, rfc3339, told_claims
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import SETTLE, Bus, Duration, Watch, settle
from zmqbus.cli.shell.output import Column, make_table, on_terminal, show_table
from zmqbus.cli.shell.stopping import PEEK, rest
from zmqbus.net.clock import time_ns
from zmqbus.protocol.topics import check_pattern

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node
    from zmqbus.protocol.members.peers import Peer

REDRAW = 0.5


# --- nodes -------------------------------------------------------------------------------------

_COLUMNS: tuple[Column, ...] = (
    Column("name"),
    Column("origin", whole=True, spare=2),
    Column("host", spare=1),
    Column("pid", right=True),
    Column("role", spare=3),
    Column("inbox", whole=True),
    Column("release", spare=4),
    Column("age", right=True),
    Column("claims"),
)


def _cells(peer: Peer) -> list[str]:
    from zmqbus.cli.messages.render import escape

    age = human_age(time_ns() / 1e9 - peer.epoch / 1e9) if peer.epoch else ""
    texts = map(
        escape, (peer.name, f"{peer.origin:016x}", peer.host, str(peer.pid), peer.role, peer.inbox, peer.version)
    )
    return [*texts, age, escape(" ".join(told_claims(peer.claims)))]


def _row(peer: Peer) -> dict[str, Any]:
    return {
        "name": peer.name,
        "origin": f"{peer.origin:016x}",
        "host": peer.host,
        "pid": peer.pid,
        "role": peer.role,
        "inbox": peer.inbox,
        "pub": peer.pub,
        "claims": told_claims(peer.claims),
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

    `age` is the time since a node was started; a forwarder `claims` the topics that it journals.
    """
    with bus.join("nodes") as (node, watch):
        if watching:
            _watch_nodes(node, watch, as_json)
            return
        settle(node, watch, wait)
        peers = _by_name(node.peers())
        if as_json:
            for peer in peers:
                click.echo(msgspec.json.encode(_row(peer)))
        elif peers:
            show_table(_COLUMNS, [_cells(peer) for peer in peers])
        if not peers and not watch.refused:
            remark(f"no other node is on bus {bus.name!r}")


def _watch_nodes(node: Node, watch: Watch, as_json: bool) -> None:
    if not as_json and on_terminal():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            while True:
                watch.poll()
                cells = [_cells(peer) for peer in _by_name(node.peers())]
                live.update(make_table(_COLUMNS, cells, live.console.width), refresh=True)
                rest(REDRAW)
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
                    click.echo(f"{event:6}  {'  '.join(_cells(peer)[:-2])}")
        present = peers
        rest(PEEK)


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
    with bus.join("topics") as (node, watch):
        settle(node, watch, wait)
        found = node.topics(*patterns, timeout=timeout)
        watch.poll()
        if as_json:
            for info in found:
                row = msgspec.structs.asdict(info) | {"origin": f"{info.origin:016x}"}
                click.echo(msgspec.json.encode(row))
        elif found:
            from zmqbus.cli.messages.render import escape

            columns: tuple[Column, ...] = (
                Column("topic"),
                Column("node"),
                Column("last seq", right=True),
                Column("bytes", right=True),
            )
            rows = [[escape(i.topic), escape(i.node), f"{i.seq:,}", human_bytes(i.bytes)] for i in found]
            show_table(columns, rows)
        if not found and (others := len(node.peers())):
            what = "on such a topic" if patterns else "anything"
            who = "the one other node" if others == 1 else f"none of the {others} other nodes"
            remark(f"{who} on bus {bus.name!r} has{' not' * (others == 1)} published {what}")
        elif not found and not watch.refused:
            remark(f"no other node is on bus {bus.name!r}")


# --- keygen ------------------------------------------------------------------------------------


@click.command()
@click.argument("file", type=click.Path())
def keygen(file: str) -> None:
    """Create a bus key in FILE, readable by you alone. Whoever has a copy of it is a member of the bus."""
    from zmqbus.net.keys import BusKey

    if file in ("", "-"):
        raise click.UsageError("a key is written to a file that only you can read: name one, such as bus.key")
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
