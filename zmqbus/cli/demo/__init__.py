"""`zmqbus demo`: the main job on real input. Log files are shipped, followed, journaled; some are stopped, or killed.

All are processes of their own (members.py, storing.py, sharing.py) that find each other by mDNS on the loopback
interface. They are started and directed (crew.py, play.py), the audience sees a narration (stage.py), and in the end
the account is settled (account.py): for each, what was sent against what it received and what it reported as lost.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from click.core import ParameterSource

from zmqbus.cli.demo.sources import FILES_MAX, find_counters, find_logs, is_text, sources
from zmqbus.cli.journal.shared import Directory
from zmqbus.cli.messages.forms import human_bytes
from zmqbus.cli.shell.bus import Duration, Whole
from zmqbus.errors import SetupError

ROOM = 512 * 1024 * 1024  # bytes for a journal of some million lines, and for the index


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path))
@click.option(
    "--rate",
    type=Whole(1, 1_000_000),
    default=20_000,
    show_default=True,
    metavar="N",
    help="Lines per second that all shippers send together, apart from the spike.",
)
@click.option(
    "--seconds",
    type=Duration(1, 600),
    default="4s",
    show_default=True,
    metavar="DURATION",
    help="How long to ship, apart from the spike, such as 10 or 1m.",
)
@click.option(
    "--history",
    type=Whole(0, 1_000_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="How many earlier lines of each file the late aggregator asks for.",
)
@click.option(
    "--journal",
    type=Directory(),
    metavar="DIR",
    help="Keep the forwarder's journal there. Default: it is removed afterwards.",
)
@click.option("--json", "as_json", is_flag=True, help="The account as one JSON object; the narration goes to stderr.")
@click.pass_context
def demo(
    context: click.Context,
    files: tuple[Path, ...],
    rate: int,
    seconds: float,
    history: int,
    journal: str | None,
    as_json: bool,
) -> int:
    """Ship this machine's own log lines, in one terminal, and see that none is lost.

    One process per log file ships its lines to logs.<host>.<file>; aggregators follow them. One of these is stopped
    for a while, during a spike; one joins late. A forwarder journals everything, and a durable consumer reads its log;
    both are killed (kill -9) and started again. Three workers share the lines of one file; one is slow, one is killed.
    Then the account: sent, received, repaired and lost, and what was published, journaled, consumed and done. Exits
    with 4 if anything is missing that was not reported as lost.

    Without a FILE: up to 8 readable logs below /var/log; with none there, readings of the counters in /proc. All of it
    stays on the loopback interface, on a bus of its own; global options have no place here. Short files are sent again
    and again.
    """
    from zmqbus.cli.demo.crew import Crew
    from zmqbus.cli.demo.play import Play
    from zmqbus.cli.demo.stage import Stage, announce, conclude

    _refuse_global_options(context)
    for path in files:
        if not is_text(path):
            raise click.BadParameter(f"{path} is not a readable file with lines of text", param_hint="FILE")
    paths = list(dict.fromkeys(files)) or find_logs() or find_counters()
    if not paths:
        raise SetupError("no readable log files below /var/log, and no counters in /proc: name some files")
    if len(paths) > FILES_MAX:
        raise click.BadParameter(
            f"{len(paths)} files: at most {FILES_MAX}, each has a process of its own", param_hint="FILE"
        )
    shipped = sources(paths, socket.gethostname())
    with _room(journal) as (folder, directory):
        if not as_json:
            announce(shipped)
        stage = Stage(err=as_json)
        crew = stage.crew = Crew(stage.redraw)
        try:
            settled = Play(stage, crew, shipped, folder, directory).perform(rate, seconds, history)
        finally:
            stage.close()
            crew.end()
    return conclude(settled, journal, as_json)


@contextlib.contextmanager
def _room(journal: str | None) -> Iterator[tuple[Path, str]]:
    """A folder that is removed afterwards, and the directory of the journal. Raises what is wrong with that one."""
    from zmqbus.journal import Journal
    from zmqbus.net.clock import time_ns

    with tempfile.TemporaryDirectory(prefix="zmqbus-demo-", ignore_cleanup_errors=True) as folder:
        free = shutil.disk_usage(folder).free
        if free < ROOM:
            raise SetupError(
                f"{folder}: there are {human_bytes(free)} left, and the demo needs {human_bytes(ROOM)}: name another "
                "place, TMPDIR=DIR zmqbus demo"
            )
        directory = journal or str(Path(folder, "journal"))
        Journal.open(directory, now_ns=time_ns()).close(time_ns())
        yield Path(folder), directory


def _refuse_global_options(context: click.Context) -> None:
    assert context.parent is not None
    for option in context.parent.command.params:
        if context.parent.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"demo has a bus of its own, on the loopback interface: leave out {option.opts[0]}")
