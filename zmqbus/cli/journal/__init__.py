"""`zmqbus journal …`: for an operator at 3 a.m., what is in a journal directory, is it sound, and what can be saved.

Rule 1: nothing here changes a journal but `repair --yes`; everything else may be run beside a working forwarder.
Rule 2: neither zmq nor the network is needed, and neither is imported.
"""

from __future__ import annotations

import os

import click

from zmqbus.cli import shell
from zmqbus.cli.journal.care import repair, verify
from zmqbus.cli.journal.info import info
from zmqbus.cli.journal.read import dump
from zmqbus.cli.journal.save import export


class _Group(shell.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; a directory in place of a command is a likely mistake."""
        if args and args[0] not in self.commands and os.path.exists(args[0]):
            raise click.UsageError(f"say first what to do with it, such as: zmqbus journal info {args[0]}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Group)
def journal() -> None:
    """Look into a forwarder's journal, check it, and save what can be saved.

    Nothing changes a journal but repair --yes. Everything else may be run while a forwarder works on it.

    \b
    When a forwarder refuses to start because its journal is damaged:
      zmqbus journal verify DIR          what is damaged, and what is lost
      cp -a DIR COPY                     if there is room
      zmqbus journal repair DIR          what a repair would do
      zmqbus journal repair --yes DIR    do it; the files as they were go to DIR/quarantine
    """


for command in (info, dump, verify, repair, export):
    journal.add_command(command)
