"""`zmqbus forwarder`: run one, ask how those on the bus are, and take away a cursor that nobody needs any more.

Running one is running.py, with log.py for stderr and systemd.py for systemd; settings.py is its config file. Asking is
asking.py, status.py and forget.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Literal

import click

from zmqbus.cli import shell
from zmqbus.cli.forwarder.forget import forget
from zmqbus.cli.forwarder.settings import configure
from zmqbus.cli.forwarder.status import status
from zmqbus.cli.journal.shared import Directory
from zmqbus.cli.messages.forms import DURATION_S_MAX
from zmqbus.cli.shell.bus import Bus, Duration, Size
from zmqbus.cli.shell.stopping import Stopped
from zmqbus.protocol.topics import check_pattern

if TYPE_CHECKING:
    from zmqbus.forwarder import Forwarder

MAX_BYTES_LEAST = 1024 * 1024  # it works in segments of a quarter of it
MAX_AGE_LEAST = 1.0


class _Group(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's; `--status` is a second name of the command."""
        if "--status" in args:
            at = args.index("--status")
            args = [*args[:at], "status", *args[at + 1 :]]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use, not of the alphabet."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; a second pattern after --topics is a likely mistake."""
        if args[0] not in self.commands and ctx.params.get("topics") and not ctx.resilient_parsing:
            raise click.UsageError(
                f"{args[0]!r} has no place here; several patterns are one text: --topics 'a.> b'", ctx
            )
        return super().resolve_command(ctx, args)


def _patterns(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    patterns = tuple(pattern for text in texts for pattern in text.split() or [text])
    for pattern in patterns:
        check_pattern(pattern)
    return patterns


@click.group(cls=_Group, invoke_without_command=True)
@click.option(
    "--config",
    type=click.Path(),
    metavar="FILE",
    is_eager=True,
    callback=configure,
    expose_value=False,
    help="A TOML file with these options, by their names, and --bus, --key-file, --interface and --peer. What is given "
    "on the command line wins.",
)
@click.option("--journal", type=Directory(), metavar="DIR", help="Where the journal is, or is to be made.")
@click.option(
    "--topics",
    multiple=True,
    metavar="PATTERN",
    callback=_patterns,
    help="The topics it claims; may be repeated, or be several patterns in one text. Default: > (all).",
)
@click.option(
    "--max-bytes",
    type=Size(MAX_BYTES_LEAST),
    metavar="SIZE",
    help="The journal's bound, such as 10G. Default: the disk's.",
)
@click.option(
    "--max-age",
    type=Duration(MAX_AGE_LEAST, DURATION_S_MAX),
    metavar="DURATION",
    help="Remove what is older, such as 7d. Default: nothing is too old.",
)
@click.option(
    "--on-full",
    type=click.Choice(["reject", "drop_oldest"]),
    default="reject",
    show_default=True,
    help="When there is no room and durable subscriptions still need the oldest messages: take no new ones, so that "
    "publishers wait, or drop the oldest.",
)
@click.option("--name", metavar="NAME", help="For people. Default: forwarder-HOST.")
@click.option("--status", is_flag=True, expose_value=False, help="The same as the command status.")
@click.pass_context
def forwarder(
    context: click.Context,
    journal: str | None,
    topics: tuple[str, ...],
    max_bytes: int | None,
    max_age: float | None,
    on_full: Literal["reject", "drop_oldest"],
    name: str | None,
) -> int:
    """Run a forwarder: a node that keeps what is published on its disk, for whoever reads it later.

    It runs in the foreground, until Ctrl-C or SIGTERM. How to run it as a service: docs/forwarder.md.

    \b
    Examples:
      zmqbus forwarder --journal /var/lib/zmqbus --max-bytes 10G --max-age 7d
      zmqbus forwarder --journal logs --topics 'logs.> metrics.>'
      zmqbus forwarder status
    """
    if (command := context.invoked_subcommand) is not None:
        given = [
            option.opts[0]
            for option in context.command.params
            if option.name in context.params
            and context.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
        ]
        if given:
            raise click.UsageError(f"{given[0]} is for running a forwarder, not for {command}")
        return shell.OK
    if journal is None:
        raise click.UsageError("say where the journal is, or is to be made: --journal DIR")
    bus: Bus = context.obj
    with contextlib.suppress(Stopped):  # asked to stop before it had begun
        _run(bus, journal, topics, max_bytes, max_age, on_full, name)
    return shell.OK


def _run(
    bus: Bus,
    journal: str,
    topics: tuple[str, ...],
    max_bytes: int | None,
    max_age: float | None,
    on_full: Literal["reject", "drop_oldest"],
    name: str | None,
) -> None:
    from zmqbus.cli.forwarder.running import run
    from zmqbus.forwarder import Forwarder

    made: Forwarder = Forwarder(
        os.path.abspath(journal),  # as it is told to others, who are elsewhere
        topics=topics or (">",),
        bytes_max=max_bytes,
        age_max=max_age,
        on_full=on_full,
        name=name or f"forwarder-{socket.gethostname()}"[:255],
        bus=bus.name,
        key=bus.key_file,
        interface=bus.interface,
        peers=bus.peers,
    )
    run(made, bus.name)


for command in (status, forget):
    forwarder.add_command(command)
