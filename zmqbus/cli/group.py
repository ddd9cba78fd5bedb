"""`cli`, the group of all commands, and its global options. What the commands share is in shell/."""

from __future__ import annotations

import sys
from typing import Any

import click

from zmqbus.cli import shell
from zmqbus.cli.demo import demo
from zmqbus.cli.forwarder import forwarder
from zmqbus.cli.journal import journal
from zmqbus.cli.pubsub.pub import pub
from zmqbus.cli.pubsub.sub import sub
from zmqbus.cli.pubsub.tap import tap
from zmqbus.cli.shell.bus import Bus
from zmqbus.cli.views import completion, keygen, nodes, topics
from zmqbus.cli.work.dead import dead
from zmqbus.cli.work.pull import pull
from zmqbus.cli.work.push import push
from zmqbus.cli.work.queues import queues
from zmqbus.cli.work.request import request
from zmqbus.node import RELEASE

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in shell.EXIT_CODES.items())


class _Group(shell.Group):
    def main(self, *args: Any, **extra: Any) -> Any:
        """As click's, with our errors and exit codes; so in tests as well."""
        extra |= {"prog_name": "zmqbus", "standalone_mode": False}
        sys.exit(shell.guarded(lambda: super(_Group, self).main(*args, **extra)))

    def invoke(self, ctx: click.Context) -> int:
        """As click's, which has its own way with Ctrl-C and closed pipes: do not let it see them."""
        return shell.guarded(lambda: super(_Group, self).invoke(ctx))


@click.group(
    cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--bus",
    default="default",
    show_default=True,
    metavar="NAME",
    envvar="ZMQBUS_BUS",
    show_envvar=True,
    help="Which bus: nodes see only nodes of the same bus.",
)
@click.option(
    "--key-file",
    type=click.Path(),  # for completion; what is wrong with it, BusKey says better
    metavar="FILE",
    envvar="ZMQBUS_KEY_FILE",
    show_envvar=True,
    help="The bus key (see keygen). Without one everything stays on this machine.",
)
@click.option(
    "--interface",
    metavar="ADDR",
    envvar="ZMQBUS_INTERFACE",
    show_envvar=True,
    help="With a key: the network interface to use, by name or address. Default: all.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="ENDPOINT",
    envvar="ZMQBUS_PEER",
    show_envvar=True,
    help="A node to join, tcp://HOST:PORT, where mDNS does not reach; may be repeated (in the environment: "
    "separated by spaces). One that can be reached is enough to find the rest.",
)
@click.version_option(RELEASE, prog_name="zmqbus", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, bus: str, key_file: str | None, interface: str | None, peers: tuple[str, ...]) -> None:
    """Messaging without a broker: nodes find each other, publish and subscribe, and repair what was missed.

    \b
    Try this, in two terminals:
      zmqbus tap
      zmqbus pub greetings.world hello
    or, in one, on your own log files:
      zmqbus demo
    """
    if key_file == "":
        raise click.UsageError("--key-file is empty: name the file of the bus key, or leave the option out")
    context.obj = Bus(bus, key_file, interface, peers)


COMMANDS = (
    *(demo, pub, sub, tap, push, pull, queues, dead, request),
    *(nodes, topics, forwarder, journal, keygen, completion),
)
for command in COMMANDS:
    cli.add_command(command)
